// The case file: calls of the kernels' C interface with their data and the outputs that the references gave. calls.py
// writes it and describes the format; nothing here knows an operator.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace harness {

// Bytes as they are in the file, once or several times, or a Gram matrix of small integers, made on the device: exact, so equal everywhere.
struct Data {
    bool gram = false;
    size_t offset = 0;
    size_t bytes = 0;  // on the device
    size_t times = 1;  // that the bytes in the file are repeated
    int batch = 0, tokens = 0, channels = 0, shift = 0;
    bool half = false;
    size_t patch_offset = 0;  // int32 places, then as many float32 values, which replace what the product gave
    size_t patches = 0;
};

struct Argument {
    enum class Kind { Parameters, Input, Null, Output, Workspace, Size, Stream } kind;
    int data = -1;
};

struct Call {
    std::string name, function;
    std::set<std::string> tags;
    std::vector<char> parameters;  // the C structure
    std::vector<Argument> arguments;
    size_t output_bytes = 0;
    std::vector<char> expected;
    std::string type;         // of the output's elements: float32, float16, bfloat16; "" where bits must be equal
    size_t row = 0;           // elements of a row
    double tolerance = 0.0;   // largest error of an element, relative to the norm of its row
};

struct CaseFile {
    std::string bytes;
    std::map<int, Data> data;
    std::vector<Call> calls;

    const char* at(size_t offset) const { return bytes.data() + start + offset; }
    size_t start = 0;
};

inline Argument argument(std::istream& line, const std::string& kind)
{
    using Kind = Argument::Kind;
    if (kind == "in") {
        Argument made{Kind::Input};
        line >> made.data;
        return made;
    }
    static const std::map<std::string, Kind> kinds = {
        {"parameters", Kind::Parameters}, {"null", Kind::Null}, {"out", Kind::Output},
        {"workspace", Kind::Workspace},   {"size", Kind::Size}, {"stream", Kind::Stream},
    };
    return Argument{kinds.at(kind)};
}

inline void read_line(CaseFile& file, std::istream& line, const std::string& word)
{
    size_t offset = 0, bytes = 0;
    if (word == "raw") {
        int id = 0;
        Data made;
        line >> id >> made.offset >> made.bytes >> made.times;
        made.bytes *= made.times;
        file.data[id] = made;
    } else if (word == "gram") {
        int id = 0, wide = 0;
        Data made;
        made.gram = true;
        line >> id >> made.offset >> made.batch >> made.tokens >> made.channels >> made.shift >> wide
            >> made.patch_offset >> made.patches;
        made.half = wide == 2;
        made.bytes = static_cast<size_t>(made.batch) * made.tokens * made.tokens * wide;
        file.data[id] = made;
    } else if (word == "call") {
        Call made;
        std::string tags, tag;
        line >> made.name >> made.function >> tags;
        std::istringstream parts(tags);
        while (std::getline(parts, tag, ',')) {
            made.tags.insert(tag);
        }
        file.calls.push_back(made);
    } else if (word == "struct") {
        line >> offset >> bytes;
        file.calls.back().parameters.assign(file.at(offset), file.at(offset) + bytes);
    } else if (word == "expected") {
        size_t row = 0, across = 0, down = 0;
        line >> offset >> bytes >> row >> across >> down;
        std::vector<char>& expected = file.calls.back().expected;
        file.calls.back().output_bytes = bytes;
        for (size_t place = 0; place < bytes / across; place += row) {  // of all rows, those further down again
            const char* const part = file.at(offset) + place % (bytes / across / down);
            for (size_t i = 0; i < across; ++i) {
                expected.insert(expected.end(), part, part + row);
            }
        }
    } else if (word == "close") {
        line >> file.calls.back().type >> file.calls.back().row >> file.calls.back().tolerance;
    } else {
        file.calls.back().arguments.push_back(argument(line, word));
    }
}

inline CaseFile read_cases(const std::string& path)
{
    std::ifstream stream(path, std::ios::binary);
    std::stringstream content;
    content << stream.rdbuf();
    CaseFile file;
    file.bytes = content.str();
    std::istringstream text(file.bytes);
    std::string word, text_line;
    int version = 0;
    size_t index = 0;
    text >> word >> version >> index;
    if (!stream || word != "btp-gpu-cases" || version != 1 || index > file.bytes.size()) {
        throw std::runtime_error(path + " is no case file of this version");
    }
    file.start = index;
    std::istringstream lines(file.bytes.substr(0, index));
    std::getline(lines, text_line);
    while (std::getline(lines, text_line)) {
        std::istringstream line(text_line);
        if (line >> word) {
            read_line(file, line, word);
        }
    }
    return file;
}

}  // namespace harness
