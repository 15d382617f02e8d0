"""Word lists of the general tasks."""

from __future__ import annotations


LETTERS = "abcdefghijklmnopqrstuvwxyz"

ADDITION_PHRASINGS = (
    "What is {first} plus {second}?",
    "Add {first} and {second}.",
    "Give the sum of {first} and {second}.",
)

UNITS = (
    ("days", "weeks", 7),
    ("hours", "days", 24),
    ("months", "years", 12),
    ("legs", "spiders", 8),
    ("legs", "beetles", 6),
    ("wheels", "wagons", 4),
    ("strings", "violins", 4),
    ("fingers", "hands", 5),
    ("eggs", "dozens", 12),
    ("players", "teams", 11),
)
UNIT_PHRASINGS = (
    "How many {small} are in {amount} {large}?",
    "Convert {amount} {large} to {small}.",
    "Give the number of {small} in {amount} {large}.",
    "{amount} {large} make how many {small}?",
)

OPPOSITES = (
    ("hot", "chilly"),
    ("big", "little"),
    ("fast", "slow"),
    ("early", "late"),
    ("open", "shut"),
    ("full", "empty"),
    ("rich", "poor"),
    ("strong", "weak"),
    ("loud", "silent"),
    ("wide", "narrow"),
    ("deep", "shallow"),
    ("young", "aged"),
    ("soft", "firm"),
    ("clean", "dirty"),
    ("sharp", "blunt"),
    ("brave", "timid"),
    ("smooth", "rough"),
    ("thick", "thin"),
    ("cheap", "costly"),
    ("simple", "complex"),
    ("polite", "rude"),
    ("awake", "asleep"),
    ("before", "after"),
    ("above", "below"),
    ("inside", "outside"),
    ("always", "never"),
    ("begin", "finish"),
    ("arrive", "depart"),
    ("laugh", "weep"),
    ("borrow", "lend"),
)
OPPOSITE_PHRASINGS = (
    "What is the opposite of {word}?",
    "Give the opposite of {word}.",
    "Which word means the reverse of {word}?",
    "Name a word that is against {word}.",
    "Find the antonym of {word}.",
)

CATEGORIES = {
    "a flower": ("tulip", "daisy", "lily", "orchid", "violet", "marigold", "lavender", "iris"),
    "a tool": ("hammer", "wrench", "chisel", "saw", "pliers", "drill", "rake", "shovel"),
    "a metal": ("copper", "tin", "nickel", "zinc", "silver", "lead", "cobalt", "bronze"),
    "a bird": ("sparrow", "robin", "heron", "finch", "swan", "pigeon", "falcon", "stork"),
    "a fruit": ("pear", "plum", "cherry", "mango", "grape", "peach", "melon", "fig"),
    "an instrument": ("flute", "cello", "harp", "trumpet", "drum", "oboe", "piano", "guitar"),
    "a garment": ("coat", "scarf", "glove", "shirt", "skirt", "vest", "hat", "sweater"),
    "a vehicle": ("truck", "tram", "ferry", "bicycle", "canoe", "scooter", "sled", "bus"),
}
CATEGORY_PHRASINGS = (
    "What kind of thing is named by {word}?",
    "Which group does the word {word} belong to?",
    "Say what the word {word} stands for.",
    "In which class would you put {word}?",
)
