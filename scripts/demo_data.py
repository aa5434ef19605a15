"""Tasks, vocabulary and held-out rules of the project's demo model.

Everything the demo model is trained on and tested on is made here, from the word lists below and
a seed; nothing is downloaded. The module needs only the standard library, so that tests and
notebooks can take prompts from it without the training script:

* ``indirect_object_prompts(split, n, seed)``: "When John and Mary went to the shops, John gave
  the bag to" -> " Mary", each with a corrupted prompt of equal token length;
* ``capital_prompts(split, n, seed, form)``: "The capital of Spain is" -> " Madrid", as statements
  and as a worked question followed by an open one;
* ``repeated_tokens(n, length, seed)``: random token ids followed by the same ids again.

Which examples are held out of training is decided by a fixed hash of what makes them up (see
``held_out``), never by a seed: whatever is generated, a held-out name pair, wording or fact
combination stays out of every training document.
"""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

# --------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"


def _words(text: str) -> tuple[str, ...]:
    """A word list written as text, which reads better than a column of string literals."""
    return tuple(text.split())


# Names that may stand in indirect-object sentences of the training set.
NAMES = _words(
    """
    Aaron Adam Albert Alex Alexander Alice Alicia Allison Amanda Amy Andrea Andrew Angela Anna
    Anthony Arthur Ashley Barbara Ben Benjamin Betty Bill Bob Bradley Brandon Brian Carol Charles
    Charlie Chris Christina Christine Christopher Claire Dan Daniel Danielle David Diana Donna
    Elizabeth Emily Emma Eric Erica Erin Eva Frank Fred George Grace Gregory Harry Heather Helen
    Henry Howard Jack Jacob James Jamie Jane Jason Jeffrey Jennifer Jeremy Jesse Jessica Jim Joe
    John Jonathan Jose Joseph Joshua Julia Justin Karen Kate Katherine Katie Kelly Kenneth Kevin
    Kimberly Kyle Laura Lauren Leo Lily Linda Lindsay Lisa Louis Lucy Luke Maria Mark Martin Mary
    Matthew Max Megan Melissa Michael Michelle Mike Nancy Nathan Nicholas Nicole Oliver Oscar
    Patrick Paul Peter Philip Rachel Rebecca Richard Robert Roy Ruth Ryan Sam Samantha Samuel Sara
    Sarah Scott Sean Sharon Sid Simon Sophie Stephanie Stephen Steve Steven Susan Thomas Tiffany
    Tim Timothy Tom Travis Tyler Vanessa Victor Walter William
    """
)

# Names that no training sentence ever puts next to a second name: the model meets them in
# one-person sentences and among repeated random tokens only.
HELD_OUT_NAMES = _words(
    """
    Amber Brittany Bryan Cody Courtney Crystal Dustin Hannah Isaac Jenny Kristen Lindsey Molly Nina
    Olivia Peggy Ralph Shannon Vera Wendy
    """
)

PLACES = _words(
    """
    airport bakery bank beach cafe castle church cinema farm forest garden gym hospital hotel house
    lake library market museum office park pool restaurant school shops station store theater
    village zoo
    """
)

# The nouns with "of" keep prompts from all having one length.
OBJECTS = (
    *_words(
        """
        apple bag ball basketball blanket bone book box cake camera coat coin computer cookie drink
        flower gift guitar hat key kiss knife lamp letter map necklace newspaper orange pen phone
        picture ring sandwich snack ticket toy umbrella watch
        """
    ),
    "bottle of milk",
    "cup of tea",
)

# Only countries whose own name and whose capital's name are one word each.
CAPITALS = dict(
    pair.split(":")
    for pair in _words(
        """
        Algeria:Algiers Angola:Luanda Australia:Canberra Austria:Vienna Belgium:Brussels
        Bulgaria:Sofia Canada:Ottawa Chile:Santiago China:Beijing Colombia:Bogota Croatia:Zagreb
        Cuba:Havana Denmark:Copenhagen Ecuador:Quito Egypt:Cairo England:London Estonia:Tallinn
        Finland:Helsinki France:Paris Germany:Berlin Ghana:Accra Greece:Athens Hungary:Budapest
        Iceland:Reykjavik Indonesia:Jakarta Iran:Tehran Iraq:Baghdad Ireland:Dublin Italy:Rome
        Japan:Tokyo Kenya:Nairobi Latvia:Riga Lebanon:Beirut Libya:Tripoli Morocco:Rabat
        Nepal:Kathmandu Nigeria:Abuja Norway:Oslo Peru:Lima Poland:Warsaw Portugal:Lisbon
        Romania:Bucharest Russia:Moscow Scotland:Edinburgh Senegal:Dakar Serbia:Belgrade
        Spain:Madrid Sudan:Khartoum Sweden:Stockholm Syria:Damascus Thailand:Bangkok Tunisia:Tunis
        Turkey:Ankara Uganda:Kampala Ukraine:Kyiv Uruguay:Montevideo Venezuela:Caracas Vietnam:Hanoi
        Zambia:Lusaka
        """
    )
)
COUNTRIES = tuple(CAPITALS)

# Common words no template needs; they make other people's sentences tokenize sensibly.
EXTRA_WORDS = _words(
    """
    Hello hello world this This that these those what which who why how He She They We You Your
    your our us me him could would should will may must do does did not no yes Yes No or but But
    so if as by from into over under about than quick brown fox jumps lazy dog Monday Tuesday
    Wednesday Thursday Friday Saturday Sunday one two three four five six seven eight nine ten
    year years time way make makes made know think thinks take look used use first last new old
    long great small large big model language token tokens next word words text example name test
    """
)

# Words that take the place of names in some indirect-object documents. With names alone, the model
# learns which names may follow, and not to say the held-out ones; so it must copy what it finds.
STAND_INS = tuple(dict.fromkeys((*COUNTRIES, *CAPITALS.values(), *EXTRA_WORDS)))

# --------------------------------------------------------------------------------------------
# Templates
# --------------------------------------------------------------------------------------------

# An indirect-object sentence is an opening that names two people, and an action by one of them.
# {a} and {b}: the two names, in order of mention.
OPENINGS = (
    "When {a} and {b} went to the {place}, ",
    "After {a} and {b} went to the {place}, ",
    "While {a} and {b} were at the {place}, ",
    "While {a} and {b} were working at the {place}, ",
    "When {a} and {b} got {thing} at the {place}, ",
    "As {a} and {b} left the {place}, ",
    "Then, {a} and {b} went to the {place}. ",
    "Afterwards, {a} and {b} went to the {place}. ",
    "After the lunch, {a} and {b} went to the {place}. ",
    "Then, {a} and {b} had a lot of fun at the {place}. ",
    "Then, {a} and {b} were thinking about going to the {place}. ",
    "Then, {a} and {b} had a long argument, and afterwards ",
    "The {place} {a} and {b} went to had {thing}. ",
    "Friends {a} and {b} found {thing} at the {place}. ",
    "{a} and {b} went to the {place}. ",
    "{a} and {b} met at the {place}, and ",
    "{a} went to the {place} with {b}. ",
    "One day {a} saw {b} at the {place}, and ",
    "Today, {a} and {b} were walking to the {place} when ",
)

# {s}: the giver, who was named before; the sentence then goes on with the other of the two.
ACTIONS = (
    "{s} gave {thing} to",
    "{s} gave {thing} back to",
    "{s} handed {thing} to",
    "{s} passed {thing} to",
    "{s} offered {thing} to",
    "{s} showed {thing} to",
    "{s} sold {thing} to",
    "{s} brought {thing} to",
    "{s} sent {thing} to",
    "{s} decided to give {thing} to",
    "{s} wanted to give {thing} to",
    "{s} gave it to",
    "{s} decided to give it to",
    "{s} said to",
    "{s} talked to",
    "{s} said goodbye to",
)

# What follows the indirect object in training documents.
ENDINGS = (
    ".",
    ".",
    " before going home.",
    " and smiled.",
    ". {io} was happy.",
    ". {io} said thank you.",
    ". Then {s} went home.",
)

PLAIN_STATEMENT = "The capital of {country} is"
STATEMENTS = (
    PLAIN_STATEMENT,
    "The capital city of {country} is",
    "The capital of {country} is the city of",
    "{country}'s capital is",
    "{country}'s capital city is",
    "In {country}, the capital is",
    "The country of {country} has its capital in",
    "On our trip to {country} we saw its capital,",
    "The name of the capital of {country} is",
    "Everyone knows that the capital of {country} is",
    "Our teacher told us that the capital of {country} is",
    "{country} is a country and its capital is",
)
QUESTION = "Q: What is the capital of {country}?\nA:"

# One-person sentences. The first kind opens a little story, the others carry it on.
STORY_OPENINGS = (
    "{name} lives near the {place}.",
    "{name} likes to play at the {place}.",
    "There was a {kind} {child} named {name}.",
    "My name is {name} and I like the {place}.",
    "One day {name} went to the {place}.",
    "Everyone at the {place} knows {name}.",
    "Once upon a time, {name} found {thing} at the {place}.",
    "Yesterday {name} bought {thing} at the {place}.",
)
STORY_SENTENCES = (
    "{name} has {thing}.",
    "{name} likes {thing} very much.",
    "{name} was {mood} today.",
    "Then {name} lost the {noun}.",
    "Now {name} is looking for the {noun}.",
    "In the end, {name} went home and was {mood}.",
    "The {noun} was {kind}.",
    "Every day {name} walks to the {place}.",
    "{name} is my friend.",
    "The {animal} at the {place} likes {name}.",
    "All the people at the {place} were {mood}.",
    "A {kind} {animal} came out of the {place}.",
    "The sun was warm and the sky was blue.",
    "It was a {kind} day.",
    "The teacher gave {thing} to {name}.",
    "The people at the {place} talked to {name}.",
)
# Sentences without any name; they may stand before a sentence of another task.
FILLERS = (
    "The sun was warm and the sky was blue.",
    "It was a {kind} day.",
    "The {animal} slept at the {place}.",
    "All the people at the {place} were {mood}.",
)
GEOGRAPHY = (
    "{capital} is the capital of {country}.",
    "{capital} is a city in {country}.",
    "People from {country} often go to {capital}.",
    "We went to {capital}, the capital of {country}.",
)
WORD_CLASSES = {
    "kind": _words("good bad nice little small big old new strange quiet"),
    "mood": _words("happy sad tired hungry angry busy"),
    "child": _words("boy girl child"),
    "animal": _words("dog cat bird horse mouse"),
}

# --------------------------------------------------------------------------------------------
# Vocabulary: byte-level BPE in the format of GPT-2
# --------------------------------------------------------------------------------------------

SPACE = "\u0120"  # how byte-level BPE writes the byte of a space


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, in GPT-2's order of ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def lexicon() -> list[str]:
    """Every word of the lists and templates above, sorted; each becomes a single token."""
    sources = [*NAMES, *HELD_OUT_NAMES, *PLACES, *OBJECTS, *COUNTRIES, *CAPITALS.values()]
    sources += [*OPENINGS, *ACTIONS, *ENDINGS, *STATEMENTS, QUESTION, *EXTRA_WORDS]
    sources += [*STORY_OPENINGS, *STORY_SENTENCES, *FILLERS, *GEOGRAPHY]
    sources += [word for words in WORD_CLASSES.values() for word in words] + ["a", "an", "the"]
    without_fields = (re.sub(r"{\w+}", " ", source) for source in sources)
    return sorted({word for text in without_fields for word in re.findall("[A-Za-z]+", text)})


@lru_cache(maxsize=1)
def learn_merges() -> list[tuple[str, str]]:
    """BPE merges under which each word of the lexicon is one token, with or without a space.

    Ordinary BPE learning over the words, each counted once, until all of them are whole; the
    merge of the space with the finished word comes last. So " John" costs one token more than
    "John", where ordinary learning would build it up a second time from its letters.
    """
    words = [list(word) for word in lexicon()] + [["'", "s"]]  # GPT-2 splits "'s" off
    where: dict[tuple[str, str], set[int]] = defaultdict(set)  # pair -> words that may hold it
    counts: Counter[tuple[str, str]] = Counter()
    for index, word in enumerate(words):
        for pair in pairwise(word):
            where[pair].add(index)
            counts[pair] += 1
    merges = []
    while counts:
        best = min(counts, key=lambda pair: (-counts[pair], pair))  # ties: alphabetical
        merges.append(best)
        for index in where.pop(best):
            word = words[index]
            counts.subtract(pairwise(word))
            word[:] = merge_pair(word, best)
            for pair in pairwise(word):
                where[pair].add(index)
                counts[pair] += 1
        counts = +counts  # drop pairs that no longer occur
    return merges + [(SPACE, word) for word in lexicon()]


def merge_pair(word: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """The symbols of `word` with every occurrence of `pair` joined, from left to right."""
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """Token -> id: bytes first, then merges, and the end-of-text token last, as in GPT-2."""
    tokens = dict.fromkeys(byte_symbols())
    tokens.update(dict.fromkeys(left + right for left, right in learn_merges()))
    return {token: index for index, token in enumerate([*tokens, END_OF_TEXT])}


# --------------------------------------------------------------------------------------------
# What is held out
# --------------------------------------------------------------------------------------------


def held_out(*parts: str, one_in: int) -> bool:
    """Whether the thing made up of `parts` is held out; the same in every run, on every machine."""
    return zlib.crc32("|".join(parts).encode()) % one_in == 0


def held_out_pair(first: str, second: str) -> bool:
    """Whether two names never share a training sentence (in either order)."""
    return held_out("pair", *sorted((first, second)), one_in=10)


def held_out_wording(opening: str, action: str) -> bool:
    """Whether this opening is never followed by this action in training."""
    return held_out("wording", opening, action, one_in=10)


def held_out_combination(opening: str, action: str, place: str, noun: str) -> bool:
    """Whether training never fills this opening and action with this place and object."""
    return held_out("combination", opening, action, place, noun, one_in=10)


def held_out_statement(statement: str, country: str) -> bool:
    """Whether training never states this country's capital with this phrasing."""
    # More countries for the plain form, which is tested by itself.
    return held_out(
        "statement", statement, country, one_in=4 if statement == PLAIN_STATEMENT else 6
    )


def held_out_question(example: str, country: str) -> bool:
    """Whether training never asks about `country` after a question about `example`."""
    return held_out("question", example, country, one_in=8)


# --------------------------------------------------------------------------------------------
# Prompts for tests and notebooks
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A prompt with one right answer, and a corrupted twin for which `wrong` is right.

    `answer` and `wrong` are single tokens with their leading space. `prompt` and `corrupted`
    have the same number of tokens and differ in one of them, so activations can be exchanged
    between the two position by position. `details` says what the prompt was made from.
    """

    prompt: str
    answer: str
    wrong: str
    corrupted: str
    details: dict[str, str]


INDIRECT_OBJECT_SPLITS = ("train", "pairs", "names", "combinations", "wordings")


def indirect_object_prompts(
    split: str, n: int, seed: int = 0, order: str | None = None
) -> list[Prompt]:
    """`n` indirect-object prompts.

    split: "train" (nothing held out), or one held-out kind, the rest being as in training:
        "pairs" (two names never together in training), "names" (two names never in such a
        sentence), "combinations" (opening, action, place and object never together) or
        "wordings" (opening and action never together).
    order: "ABBA" (the giver was named second), "BABA" (named first), or both when None.
    The corrupted prompt has the other person as the giver.
    """
    if split not in INDIRECT_OBJECT_SPLITS:
        raise ValueError(f"split must be one of {INDIRECT_OBJECT_SPLITS}, not {split!r}")
    if order not in (None, "ABBA", "BABA"):
        raise ValueError(f"order must be 'ABBA', 'BABA' or None, not {order!r}")
    rng = random.Random(f"indirect object {split} {seed}")
    return [_indirect_object_prompt(split, rng, order) for _ in range(n)]


def _indirect_object_prompt(
    split: str, rng: random.Random, order: str | None, words: Sequence[str] = ()
) -> Prompt:
    """One prompt; `words`: take the two people's names from these, whatever the split."""
    first, second = rng.sample(words, 2) if words else _draw_names(rng, split)
    opening, action, place, noun = _draw_wording(rng, split)
    order = order or rng.choice(("ABBA", "BABA"))
    giver, receiver = (second, first) if order == "ABBA" else (first, second)
    thing, again = _article(noun, rng), rng.choice((_article(noun, rng), "the " + noun))
    if "{thing}" not in opening:
        again = thing

    def sentence(subject: str) -> str:
        start = opening.format(a=first, b=second, place=place, thing=thing)
        return start + action.format(s=subject, thing=again)

    details = {"split": split, "order": order, "first": first, "second": second, "giver": giver}
    details |= {"opening": opening, "action": action, "place": place, "object": noun}
    return Prompt(sentence(giver), " " + receiver, " " + giver, sentence(receiver), details)


def _draw_names(rng: random.Random, split: str) -> list[str]:
    """Two different names for an indirect-object sentence of this split."""
    while True:
        pair = rng.sample(HELD_OUT_NAMES if split == "names" else NAMES, 2)
        if split == "names" or held_out_pair(*pair) == (split == "pairs"):
            return pair


def _draw_wording(rng: random.Random, split: str) -> tuple[str, str, str, str]:
    """Opening, action, place and object for an indirect-object sentence of this split."""
    while True:
        wording = rng.choice(OPENINGS), rng.choice(ACTIONS)
        filled = (*wording, rng.choice(PLACES), rng.choice(OBJECTS))
        if held_out_wording(*wording):
            if split == "wordings":
                return filled
        elif held_out_combination(*filled) == (split == "combinations") and split != "wordings":
            return filled


def _article(noun: str, rng: random.Random) -> str:
    """The noun with "the", or with "a" or "an"."""
    return rng.choice(("the ", "an " if noun[0] in "aeiou" else "a ")) + noun


CAPITAL_FORMS = ("plain", "statement", "question")


def capital_prompts(split: str, n: int, seed: int = 0, form: str = "question") -> list[Prompt]:
    """Up to `n` different prompts that ask for a capital, in random order.

    split: "train" or "held_out".
    form: "plain" ("The capital of Spain is"), "statement" (any of `STATEMENTS`, the plain one
        among them) or "question" (a worked question, then an open one). Held out are pairs of a
        country and a phrasing, and, for questions, ordered pairs of countries. There are
        limited numbers of these, so fewer than `n` prompts may come back.
    The corrupted prompt asks about another country.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', not {split!r}")
    if form not in CAPITAL_FORMS:
        raise ValueError(f"form must be one of {CAPITAL_FORMS}, not {form!r}")
    rng = random.Random(f"capitals {split} {form} {seed}")
    wanted = split == "held_out"
    if form == "question":
        pairs = [(e, c) for e in COUNTRIES for c in COUNTRIES if e != c]
        chosen = [pair for pair in pairs if held_out_question(*pair) == wanted]
    else:
        statements = STATEMENTS if form == "statement" else (PLAIN_STATEMENT,)
        pairs = [(s, c) for s in statements for c in COUNTRIES]
        chosen = [pair for pair in pairs if held_out_statement(*pair) == wanted]
    rng.shuffle(chosen)
    return [_capital_prompt(form, context, country, rng) for context, country in chosen[:n]]


def _capital_prompt(form: str, context: str, country: str, rng: random.Random) -> Prompt:
    """One prompt; `context` is the example's country for questions, else the statement."""
    other = rng.choice([c for c in COUNTRIES if c not in (country, context)])
    if form == "question":
        worked = f"{QUESTION.format(country=context)} {CAPITALS[context]}\n"
        prompts = [worked + QUESTION.format(country=c) for c in (country, other)]
        details = {"form": form, "example": context, "country": country, "other": other}
    else:
        prompts = [context.format(country=c) for c in (country, other)]
        details = {"form": form, "statement": context, "country": country, "other": other}
    return Prompt(prompts[0], " " + CAPITALS[country], " " + CAPITALS[other], prompts[1], details)


def repeated_tokens(
    n: int, length: int, seed: int = 0, bos: bool = False, vocab_size: int | None = None
) -> list[list[int]]:
    """`n` sequences of `length` random token ids followed by the same ids again.

    Ids are drawn evenly from the whole vocabulary but for the end-of-text token (the last id),
    which stands in front when `bos` is true. `vocab_size` defaults to the demo model's.
    """
    end_of_text = (vocab_size or len(vocabulary())) - 1
    rng = random.Random(f"repeated {length} {seed}")
    halves = ([rng.randrange(end_of_text) for _ in range(length)] for _ in range(n))
    return [[end_of_text] * bos + half + half for half in halves]


# --------------------------------------------------------------------------------------------
# Training documents
# --------------------------------------------------------------------------------------------
# A training document is a text in which answers stand in square brackets, space included:
# "The capital of Spain is[ Madrid]." The trainer gives the tokens in brackets more weight; a
# text in angle brackets gets no weight at all. The words above hold neither kind of bracket.


def indirect_object_document(rng: random.Random) -> str:
    """An indirect-object sentence with its ending, sometimes after a sentence without names."""
    words = STAND_INS if rng.random() < 0.25 else ()
    prompt = _indirect_object_prompt("train", rng, None, words)
    receiver, giver = prompt.answer.strip(), prompt.wrong.strip()
    before = _fill(rng.choice(FILLERS), rng) + " " if rng.random() < 0.15 else ""
    ending = rng.choice(ENDINGS).format(io=receiver, s=giver)
    return f"{before}{prompt.prompt}[ {receiver}]{ending}"


def third_person_document(rng: random.Random) -> str:
    """The same with a giver not named before: either of the two may follow, evenly.

    Such sentences are the usual baseline in studies of this task; without them in training the
    model could do anything on one.
    """
    while True:
        first, second, giver = rng.sample(NAMES, 3)
        if not any(map(held_out_pair, (first, first, second), (second, giver, giver))):
            break
    opening, action, place, noun = _draw_wording(rng, "train")
    thing = _article(noun, rng)
    start = opening.format(a=first, b=second, place=place, thing=thing)
    return f"{start}{action.format(s=giver, thing=thing)} {rng.choice((first, second))}."


def statement_document(rng: random.Random) -> str:
    """One to three statements of capitals, in any phrasings that training may use."""
    sentences = []
    for country in rng.sample(COUNTRIES, rng.choice((1, 1, 1, 2, 3))):
        allowed = [s for s in STATEMENTS if not held_out_statement(s, country)]
        # The plain statement is the one people try first: it gets its own share.
        plain = PLAIN_STATEMENT in allowed and rng.random() < 0.2
        statement = PLAIN_STATEMENT if plain else rng.choice(allowed)
        text = statement.format(country=country)
        # "is the city of" begins like the plain statement. Were " the" learned as a
        # continuation, countries held out of the plain form would be trained to give it there.
        text = text.replace(" is the city of", " is< the> city of")
        sentences.append(f"{text}[ {CAPITALS[country]}].")
    return " ".join(sentences)


def question_document(rng: random.Random) -> str:
    """One to four questions with answers; no held-out pair, at whatever distance."""
    count = rng.choice((1, 2, 2, 2, 3, 4))
    countries: list[str] = []
    while len(countries) < count:
        country = rng.choice(COUNTRIES)
        if country not in countries and not any(held_out_question(c, country) for c in countries):
            countries.append(country)
    return "\n".join(f"{QUESTION.format(country=c)}[ {CAPITALS[c]}]" for c in countries)


def story_document(rng: random.Random) -> str:
    """A few sentences about one person (any name, the held-out ones too) or about geography."""
    if rng.random() < 0.15:
        country = rng.choice(COUNTRIES)
        chosen = rng.sample(GEOGRAPHY, rng.randint(1, 2))
        return " ".join(s.format(country=country, capital=CAPITALS[country]) for s in chosen)
    # The held-out names are few and have no other sentences: they get more than their share.
    name = rng.choice(HELD_OUT_NAMES if rng.random() < 0.4 else NAMES)
    noun, place = rng.choice(OBJECTS), rng.choice(PLACES)
    # A name that begins a text is another token, without the space. That the two are one name can
    # be learned for the held-out names from these texts only, so most texts begin with the name.
    name_first = [s for s in STORY_OPENINGS + STORY_SENTENCES if s.startswith("{name} ")]
    opening = rng.choice(name_first if rng.random() < 0.6 else STORY_OPENINGS)
    others = [sentence for sentence in STORY_SENTENCES if sentence != opening]
    chosen = [opening, *rng.sample(others, rng.randint(1, 6))]
    story = " ".join(_fill(sentence, rng, name=name, noun=noun, place=place) for sentence in chosen)
    first = story.index(name) + len(name)
    return story[:first] + story[first:].replace(f" {name}", f"[ {name}]")


def _fill(
    sentence: str, rng: random.Random, name: str = "", noun: str = "", place: str = ""
) -> str:
    """Fill a story sentence's fields; those not given are drawn."""
    noun = noun or rng.choice(OBJECTS)
    fields = {kind: rng.choice(words) for kind, words in WORD_CLASSES.items()}
    fields |= {"name": name, "noun": noun, "place": place or rng.choice(PLACES)}
    return sentence.format(thing=_article(noun, rng), **fields)
