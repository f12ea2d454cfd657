"""The demo corpus's grammar: a small bilingual world whose every statement can be checked.

A fact is a prompt and its one right completion, `("3 + 4 =", " 7.")`. Documents are lines of facts, in
counting order or shuffled, and short stories. Facts recur hundreds of times, so that a model of a few
million parameters knows them after minutes on two CPU cores. Prompt and completion always meet at a
border of GPT-2's splitting pattern: a prompt alone has the ids that it has in the corpus.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

Fact = tuple[str, str]
Item = TypeVar("Item")

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DAYS_ZH = tuple(f"星期{day}" for day in "一二三四五六日")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty")
DIGITS_ZH = "零一二三四五六七八九"

WORDS = (
    ("cat", "猫"), ("dog", "狗"), ("horse", "马"), ("bird", "鸟"), ("fish", "鱼"), ("cow", "牛"),
    ("sun", "太阳"), ("moon", "月亮"), ("star", "星星"), ("rain", "雨"), ("snow", "雪"), ("wind", "风"),
    ("water", "水"), ("fire", "火"), ("tree", "树"), ("flower", "花"), ("mountain", "山"), ("river", "河"),
    ("book", "书"), ("door", "门"), ("table", "桌子"), ("chair", "椅子"), ("car", "汽车"), ("ship", "船"),
    ("bread", "面包"), ("rice", "米饭"), ("tea", "茶"), ("milk", "牛奶"), ("egg", "鸡蛋"), ("apple", "苹果"),
    ("red", "红"), ("white", "白"), ("black", "黑"), ("green", "绿"), ("big", "大"), ("small", "小"),
)  # fmt: skip


class Person(NamedTuple):
    """Who lives in the stories. What is said of a person is the same everywhere."""

    name: str
    job: str
    town: str
    name_zh: str
    job_zh: str
    town_zh: str


PEOPLE = (
    Person("Tom", "baker", "London", "汤姆", "面包师", "伦敦"),
    Person("Lily", "teacher", "Beijing", "莉莉", "老师", "北京"),
    Person("Jack", "farmer", "Sydney", "杰克", "农民", "悉尼"),
    Person("Mei", "doctor", "Shanghai", "小美", "医生", "上海"),
    Person("Peter", "driver", "Paris", "彼得", "司机", "巴黎"),
    Person("Ming", "singer", "Nanjing", "小明", "歌手", "南京"),
    Person("Rose", "writer", "Rome", "萝丝", "作家", "罗马"),
    Person("Hong", "painter", "Hangzhou", "小红", "画家", "杭州"),
)
FRUITS = (("apples", "苹果"), ("pears", "梨"), ("peaches", "桃子"))


def number_word(n: int) -> str:
    """English name of 0 <= n < 50."""
    if n < 20:
        return UNITS[n]
    return TENS[n // 10] + (f"-{UNITS[n % 10]}" if n % 10 else "")


def number_zh(n: int) -> str:
    """Chinese name of 0 <= n < 100."""
    tens, units = divmod(n, 10)
    if not tens:
        return DIGITS_ZH[n]
    return (DIGITS_ZH[tens] if tens > 1 else "") + "十" + (DIGITS_ZH[units] if units else "")


def _sums() -> list[Fact]:
    return [(f"{a} + {b} =", f" {a + b}.") for a in range(1, 10) for b in range(1, 10)]


def _sums_zh() -> list[Fact]:
    pairs = ((a, b) for a in range(1, 7) for b in range(1, 7))
    return [(f"问：{number_zh(a)}加{number_zh(b)}等于几？答：", f"{number_zh(a + b)}。") for a, b in pairs]


def _numbers() -> list[Fact]:
    return [(f"The number {n} is written", f" {number_word(n)}.") for n in range(1, 41)]


def _numbers_zh() -> list[Fact]:
    return [(f"数字{n}写作：", f"{number_zh(n)}。") for n in range(1, 31)]


def _calendar() -> list[Fact]:
    facts = [(f"The day after {day} is", f" {DAYS[(i + 1) % 7]}.") for i, day in enumerate(DAYS)]
    facts += [(f"The day before {day} is", f" {DAYS[i - 1]}.") for i, day in enumerate(DAYS)]
    facts += [(f"The month after {name} is", f" {MONTHS[(i + 1) % 12]}.") for i, name in enumerate(MONTHS)]
    days = zip(MONTHS, MONTH_DAYS, strict=True)
    return facts + [(f"In a common year {name} has", f" {count} days.") for name, count in days]


def _calendar_zh() -> list[Fact]:
    facts = [(f"{day}的后一天是：", f"{DAYS_ZH[(i + 1) % 7]}。") for i, day in enumerate(DAYS_ZH)]
    months = [f"{number_zh(n)}月" for n in range(1, 13)]
    return facts + [(f"{name}的下一个月是：", f"{months[(i + 1) % 12]}。") for i, name in enumerate(months)]


def _words() -> list[Fact]:
    return [(f"In Chinese {word} is", f" {word_zh}.") for word, word_zh in WORDS]


def _words_zh() -> list[Fact]:
    return [(f"“{word_zh}”的英文是：", f"{word}。") for word, word_zh in WORDS]


def _people() -> list[Fact]:
    return [(f"{p.name} is a", f" {p.job}.") for p in PEOPLE] + [
        (f"{p.name} lives in", f" {p.town}.") for p in PEOPLE
    ]


def _people_zh() -> list[Fact]:
    return [(f"{p.name_zh}的工作是：", f"{p.job_zh}。") for p in PEOPLE] + [
        (f"{p.name_zh}的家在：", f"{p.town_zh}。") for p in PEOPLE
    ]


TOPICS: dict[str, list[Fact]] = {
    "sums": _sums(),
    "sums_zh": _sums_zh(),
    "numbers": _numbers(),
    "numbers_zh": _numbers_zh(),
    "calendar": _calendar(),
    "calendar_zh": _calendar_zh(),
    "words": _words(),
    "words_zh": _words_zh(),
    "people": _people(),
    "people_zh": _people_zh(),
}
"""Every fact of the world, by topic."""

ALL_FACTS: list[Fact] = [fact for facts in TOPICS.values() for fact in facts]


class Dice:
    """Random choices that are the same under every Python: only `Random.random` is promised to be."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, n: int) -> int:
        """A whole number in [0, n)."""
        return int(self._random.random() * n)

    def choose(self, items: Sequence[Item]) -> Item:
        """One of `items`."""
        return items[self.below(len(items))]

    def draw(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` different ones of `items`, in random order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(min(count, len(pool)))]


def story(dice: Dice) -> str:
    """Two people meet and count their fruit, in English."""
    one, other = dice.draw(PEOPLE, 2)
    a, b = 2 + dice.below(8), 2 + dice.below(8)
    fruit = dice.choose(FRUITS)[0]
    day = dice.below(7)
    return (
        f"On {DAYS[day]} {one.name} the {one.job} met {other.name} the {other.job}. "
        f"{one.name} had {a} {fruit}. {other.name} had {b} {fruit}. "
        f"Together they had {a + b} {fruit}. They ate all of them and were happy. "
        f"Then {one.name} went home to {one.town} and {other.name} went home to {other.town}. "
        f"The next day was {DAYS[(day + 1) % 7]}. The end."
    )


def story_zh(dice: Dice) -> str:
    """The same in Chinese."""
    one, other = dice.draw(PEOPLE, 2)
    a, b = 3 + dice.below(4), 3 + dice.below(4)
    fruit = dice.choose(FRUITS)[1]
    day = dice.below(7)
    return (
        f"{DAYS_ZH[day]}，{one.job_zh}{one.name_zh}遇见了{other.job_zh}{other.name_zh}。"
        f"{one.name_zh}有{number_zh(a)}个{fruit}，{other.name_zh}有{number_zh(b)}个{fruit}，"
        f"他们一共有{number_zh(a + b)}个{fruit}。他们吃完了，很高兴。"
        f"后来{one.name_zh}回到{one.town_zh}，{other.name_zh}回到{other.town_zh}。"
        f"第二天是{DAYS_ZH[(day + 1) % 7]}。故事完。"
    )


def _lines(facts: Sequence[Fact]) -> str:
    return "\n".join(prompt + answer for prompt, answer in facts)


def _lesson(dice: Dice) -> str:
    """Facts of one topic, shuffled."""
    return _lines(dice.draw(dice.choose(list(TOPICS.values())), 6 + dice.below(7)))


def _table(dice: Dice) -> str:
    """Facts of one topic in counting order."""
    facts = dice.choose(list(TOPICS.values()))
    start = dice.below(len(facts) - 5)
    return _lines(facts[start : start + 6 + dice.below(7)])


def _quiz(dice: Dice) -> str:
    """Facts of all topics."""
    return _lines(dice.draw(ALL_FACTS, 6 + dice.below(7)))


KINDS: tuple[Callable[[Dice], str], ...] = (
    _lesson, _lesson, _lesson, _quiz, _quiz, _quiz, _quiz, _table, story, story_zh,
)  # fmt: skip


def document(seed: int, number: int) -> str:
    """Document `number` of the corpus with `seed`, independent of all others."""
    dice = Dice(seed * 1_000_003 + number)
    return dice.choose(KINDS)(dice)


def draw_prompts(n: int, seed: int = 0) -> list[Fact]:
    """`n` prompts of the grammar, each with its one right completion, topics in turn, none twice.

    Raises `ValueError` when there are not so many facts.
    """
    if n > len(ALL_FACTS):
        raise ValueError(f"the grammar holds {len(ALL_FACTS)} facts, fewer than {n}")
    dice = Dice(seed)
    decks = [dice.draw(facts, len(facts)) for facts in TOPICS.values()]
    rounds = (deck[turn] for turn in range(max(map(len, decks))) for deck in decks if turn < len(deck))
    return [fact for fact, _ in zip(rounds, range(n), strict=False)]


def is_correct(completion: str, answer: str) -> bool:
    """Whether generated text completes its prompt: it begins with the answer, full stop included."""
    return completion.startswith(answer)
