"""Errors a user can cause. Each says what was got, what was wanted and what to do, and carries its exit code."""

LONGEST = 500  # characters of a line; more is somebody else's dump, and its end is rarely what helps


class BtpError(Exception):
    """Base of every error the toolkit raises on purpose.

    The text is at most three lines: what was got, what was wanted, what to do next. Each is cut to LONGEST characters.
    """

    exit_code = 1

    def __init__(self, got: str, wanted: str = "", do: str = "") -> None:
        self.got, self.wanted, self.do = got, wanted, do
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """The message, one to three lines, without a trailing newline."""
        lines = [self.got]
        if self.wanted:
            lines.append(f"wanted: {self.wanted}")
        if self.do:
            lines.append(f"do this: {self.do}")
        return [shortened(line) for line in lines]


def shortened(text: str) -> str:
    """One line of at most LONGEST characters; what is left out of the middle is marked."""
    text = " ".join(text.splitlines())
    half = (LONGEST - 5) // 2
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


def with_article(noun: str) -> str:
    """ "a plan", "an engine record"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


class CheckError(BtpError):
    """A check did not hold (exit code 1)."""

    exit_code = 1


class InputError(BtpError):
    """Bad input or usage (exit code 2)."""

    exit_code = 2


class UnavailableError(BtpError):
    """Something needed is not installed or not reachable (exit code 3)."""

    exit_code = 3
