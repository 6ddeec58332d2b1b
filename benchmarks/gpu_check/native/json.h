// Just enough JSON to print results: objects and lists of numbers and text.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

namespace harness {

inline std::string quoted(const std::string& text)
{
    std::string out = "\"";
    for (const char letter : text) {
        if (letter == '"' || letter == '\\') {
            out += '\\';
        }
        out += static_cast<unsigned char>(letter) < 32 ? ' ' : letter;
    }
    return out + "\"";
}

inline std::string number(double value)
{
    char text[32];
    std::snprintf(text, sizeof text, "%.9g", value);
    return std::isfinite(value) ? text : "null";
}

inline std::string list(const std::vector<std::string>& items)
{
    std::string out = "[";
    for (const std::string& item : items) {
        out += (out.size() > 1 ? ", " : "") + item;
    }
    return out + "]";
}

class Object {
public:
    Object& text(const std::string& name, const std::string& value) { return raw(name, quoted(value)); }
    Object& value(const std::string& name, double value) { return raw(name, number(value)); }
    Object& raw(const std::string& name, const std::string& json)
    {
        body_ += (body_.empty() ? "" : ", ") + quoted(name) + ": " + json;
        return *this;
    }
    std::string str() const { return "{" + body_ + "}"; }

private:
    std::string body_;
};

}  // namespace harness
