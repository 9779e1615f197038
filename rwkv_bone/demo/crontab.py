"""The demo's task: a sentence that says when something shall run -> the five fields of a crontab line.

    {"question": "Every Monday at 5:40 pm", "answer": "40 17 * * 1"}

The fields are minute, hour, day of the month, month, day of the week (0 is Sunday), as in crontab(5).
"""

import random

DAYS = "Sunday Monday Tuesday Wednesday Thursday Friday Saturday".split()


def time_of_day(draw: random.Random) -> tuple[str, str]:
    """A time in words, and its fields "minute hour"."""
    hour, minute = draw.randrange(24), draw.randrange(0, 60, 5)
    return f"{hour % 12 or 12}:{minute:02} {'am' if hour < 12 else 'pm'}", f"{minute} {hour}"


def days(draw: random.Random) -> tuple[str, str]:
    """Days in words, and their fields "day month weekday"."""
    one, other = draw.sample(range(7), 2)
    return draw.choice(
        [
            ("every day", "* * *"),
            ("on weekdays", "* * 1-5"),
            ("on the first of the month", "1 * *"),
            (f"every {DAYS[one]}", f"* * {one}"),
            (f"on {DAYS[one]} and {DAYS[other]}", f"* * {one},{other}"),
        ]
    )


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` questions and answers, no answer twice: what is held out of them is never seen in training. At most 10,000."""
    assert count <= 10_000, "there are 14,976 answers"
    draw = random.Random(seed)
    found: dict[str, dict[str, str]] = {}
    while len(found) < count:
        (time, clock), (day, date) = time_of_day(draw), days(draw)
        sentence = draw.choice([f"{day} at {time}", f"at {time} {day}"])
        answer = f"{clock} {date}"
        found.setdefault(answer, {"question": sentence[0].upper() + sentence[1:], "answer": answer})
    return list(found.values())
