"""The demo: its data are right, and its model learns them."""

import re
from datetime import datetime

import pytest

from rwkv_bone.demo import command
from rwkv_bone.demo.crontab import DAYS, rows
from rwkv_bone.training import summary


def test_each_answer_is_what_its_sentence_says_and_comes_once():
    made = rows(3000)
    assert len({row["answer"] for row in made}) == len({row["question"] for row in made}) == 3000
    assert made == rows(3000) and made != rows(3000, seed=1)
    for row in made:
        minute, hour, day, month, weekday = row["answer"].split()
        time = datetime.strptime(re.search(r"\d+:\d+ [ap]m", row["question"])[0], "%I:%M %p")
        assert (time.minute, time.hour) == (int(minute), int(hour)) and month == "*"
        assert (day == "1") == ("first of the month" in row["question"])
        named = [str(DAYS.index(word)) for word in row["question"].split() if word in DAYS]
        assert weekday == ("1-5" if "weekdays" in row["question"] else ",".join(named) or "*")


@pytest.mark.slow
def test_the_model_knows_nothing_of_the_task_before_and_most_of_it_after(tmp_path, capfd, draw, monkeypatch):
    monkeypatch.setattr(summary, "draw", draw)
    assert command.main([str(tmp_path)]) == 0
    said = capfd.readouterr().out
    before, after = map(int, re.findall(r"(?:before|after): (\d+)% right", said))
    assert before <= 2 and after >= 80, said
    assert (tmp_path / "tuned.pth").exists() and (tmp_path / "tuned" / "loss.png").exists()
