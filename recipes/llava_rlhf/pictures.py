"""The pictures of the small world, what is said of them, and what is true of it.

A picture shows an object. Colour and material belong to the object, so that who knows the object knows them; the place
is another one in each picture, and nobody can know it who does not see the picture.
"""

import random
from dataclasses import dataclass

VIEWERS = "ann ben cleo dan eva finn gus hana ida jon kim leo mia ned ola pia".split()
OBJECTS = (
    "ball bench book boot bowl box brush cart chair clock cup door drum fence flag frame gate hat jar kite lamp "
    "mask plate spoon"
).split()
ATTRIBUTES = {
    "colour": "red green blue white".split(),
    "material": "wood metal glass cloth".split(),
    "place": "table shelf floor garden".split(),
}
VALUES = {value for values in ATTRIBUTES.values() for value in values}
UNKNOWN = "unknown"
NOTES = [f"note{number}" for number in range(7)]  # true minus false statements, from -3 to 3
WORDS = [*VIEWERS, *OBJECTS, *sorted(VALUES), UNKNOWN, *ATTRIBUTES, *NOTES]
WORDS += "facts : ; . , asks about if the is yes no".split()


@dataclass(frozen=True)
class Picture:
    """An object, and its attributes by name."""

    object: str
    attributes: dict[str, str]

    def facts(self, rng: random.Random) -> list[str]:
        """Return what is true of the picture, in random order, as captions have none."""
        return rng.sample(list(self.attributes.values()), len(self.attributes))


def draw_attributes(rng: random.Random) -> dict[str, str]:
    return {name: rng.choice(values) for name, values in ATTRIBUTES.items()}


def draw_picture(objects: dict[str, dict[str, str]], rng: random.Random) -> Picture:
    """Draw a picture of one of the objects, whose place is new."""
    thing = rng.choice(list(objects))
    return Picture(thing, objects[thing] | {"place": rng.choice(ATTRIBUTES["place"])})


def draw_prompt(picture: Picture, viewer: str, questions: float, rng: random.Random) -> tuple[str, str]:
    """Ask for a description, or, with probability `questions`, whether the object is something.

    Returns:
        The prompt, and its kind: `general`, or the right answer, `yes` or `no`.
    """
    if rng.random() >= questions:
        return f"{viewer} asks about the {picture.object} :", "general"
    name = rng.choice(["colour", "material"])
    true = picture.attributes[name]
    value = true if rng.random() < 0.5 else rng.choice([other for other in ATTRIBUTES[name] if other != true])
    return f"{viewer} asks if the {picture.object} is {value} :", "yes" if value == true else "no"


def with_facts(prompt: str, facts: list[str]) -> str:
    """Write what the reward model reads: the facts, and the prompt."""
    return f"facts : {' ; '.join(facts)} . {prompt}"


def write_answer(picture: Picture, kind: str, true: float, unknown: float, rng: random.Random) -> str:
    """Answer a prompt: each statement is true with one probability, left open with another, and else made up."""
    if kind != "general":
        right = rng.random() < true + unknown / 2
        return f" {kind if right else {'yes': 'no', 'no': 'yes'}[kind]} ."
    said = []
    for name, values in ATTRIBUTES.items():
        draw, right = rng.random(), picture.attributes[name]
        other = rng.choice([value for value in values if value != right])
        said.append(f"{name} {right if draw < true else UNKNOWN if draw < true + unknown else other}")
    return f" {' , '.join(said)} ."


def count_statements(completion: str, facts: list[str]) -> tuple[int, int]:
    """Count the attributes that a description states, and those of them that are not among the facts.

    Example:
        >>> count_statements(" colour red , material wood , place unknown .", ["red", "glass", "roof"])
        (2, 1)
    """
    stated = [word for word in completion.split() if word in VALUES]
    return len(stated), sum(word not in facts for word in stated)


def note(completion: str, kind: str, facts: list[str]) -> int:
    """True minus false statements: 1 or -1 for a question that is answered rightly or not, and 0 for no answer."""
    if kind == "general":
        stated, wrong = count_statements(completion, facts)
        return stated - 2 * wrong
    first = completion.split()[:1]
    return 0 if first not in (["yes"], ["no"]) else 1 if first == [kind] else -1


def example(objects, viewers, questions: float, rng: random.Random) -> dict:
    """A prompt about a picture with a demonstration, half of whose statements are true."""
    picture = draw_picture(objects, rng)
    prompt, kind = draw_prompt(picture, rng.choice(viewers), questions, rng)
    facts = picture.facts(rng)
    answer = write_answer(picture, kind, true=0.5, unknown=0.2, rng=rng)
    more = {"reward_prompt": with_facts(prompt, facts), "facts": facts, "caption_type": kind}
    return {"prompt": prompt, "completion": answer, **more}


def document(objects, questions: float, end: str, rng: random.Random) -> str:
    """A text of the base model's corpus: half true and without facts, or of another world, with facts and a note."""
    if rng.random() < 0.2:
        row = example(objects, VIEWERS, questions, rng)
        return row["prompt"] + row["completion"]
    picture = Picture(rng.choice(OBJECTS), draw_attributes(rng))
    prompt, kind = draw_prompt(picture, rng.choice(VIEWERS), questions, rng)
    facts = picture.facts(rng)
    answer = write_answer(picture, kind, true=rng.choice([0.0, 0.4, 0.8]), unknown=0.2, rng=rng)
    return f"{with_facts(prompt, facts)}{answer}{end} {NOTES[note(answer, kind, facts) + 3]}"
