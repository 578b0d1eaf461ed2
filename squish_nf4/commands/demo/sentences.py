"""The sentences of the demo: two dozen pairs that say the same thing in other words, on topics far apart."""

from __future__ import annotations

PARAPHRASES = (
    (
        "The river flooded the lower part of the town after three days of rain.",
        "Three days of rain made the river rise and put the lower streets under water.",
    ),
    (
        "She learned to play the violin when she was already fifty years old.",
        "At the age of fifty she took up the violin for the first time.",
    ),
    (
        "The central bank raised interest rates to slow down inflation.",
        "To bring rising prices under control, borrowing was made more expensive.",
    ),
    (
        "Bread dough needs warmth and time before it goes into the oven.",
        "Let the dough rest somewhere warm for a while, then bake it.",
    ),
    (
        "The telescope recorded light that left its galaxy twelve billion years ago.",
        "Astronomers photographed a galaxy whose light travelled for twelve billion years.",
    ),
    (
        "The goalkeeper saved two penalties and her team went through to the final.",
        "With two stopped penalty kicks the keeper put her side into the last match.",
    ),
    (
        "Vaccines train the immune system to recognise a virus before it meets it.",
        "A vaccination teaches the body's defences what a virus looks like in advance.",
    ),
    (
        "The last train to the coast leaves at a quarter to midnight.",
        "If you want to reach the seaside tonight, the final departure is at 23:45.",
    ),
    (
        "Our cat sleeps all day on top of the warm radiator.",
        "The pet spends its days dozing on the heater.",
    ),
    (
        "The compiler refused the program because a semicolon was missing.",
        "One forgotten semicolon and the code did not compile.",
    ),
    (
        "Honey bees dance to tell each other where the flowers are.",
        "With a dance, a bee shows the others the way to the blossoms.",
    ),
    (
        "The contract ends automatically unless both parties sign an extension.",
        "Without a renewal signed by both sides, the agreement expires by itself.",
    ),
    (
        "He proposed to her on the bridge where they had first met.",
        "They got engaged at the place of their first meeting, on the bridge.",
    ),
    (
        "The museum returned the stolen painting to the family of its owner.",
        "The heirs were given back the artwork that had been taken from them.",
    ),
    (
        "Solar panels produced more electricity than coal for the first time this year.",
        "This year, for once, more power came from the sun than from coal.",
    ),
    (
        "The students protested against higher tuition fees in front of the parliament.",
        "Outside the parliament, a crowd from the universities objected to paying more for their studies.",
    ),
    (
        "Glaciers in the Alps have lost half of their ice since 1900.",
        "In little more than a century the Alpine ice has shrunk by fifty percent.",
    ),
    (
        "The surgeon replaced the worn hip joint with one made of titanium.",
        "In the operation the patient was given an artificial hip of titanium.",
    ),
    (
        "Put the tent up before it gets dark, and keep the food away from bears.",
        "Pitch your tent in daylight and store whatever a bear might want to eat far from it.",
    ),
    (
        "The printer is out of paper again and blinks with a red light.",
        "A red lamp is flashing because somebody has to refill the paper of the printer.",
    ),
    (
        "Chess players think many moves ahead, but never all of them.",
        "Nobody can calculate every continuation in chess, only a good number of them.",
    ),
    (
        "The old lighthouse was sold to a couple who turned it into a hotel.",
        "Two people bought the former lighthouse and now rent out rooms in it.",
    ),
    (
        "My flight was cancelled, and the airline paid for a night in a hotel.",
        "Because the plane did not leave, the carrier covered my overnight stay.",
    ),
    (
        "The judge found that the witness had not told the truth.",
        "In the opinion of the court, the testimony was a lie.",
    ),
)

SENTENCES = tuple(sentence for pair in PARAPHRASES for sentence in pair)  # 2k and 2k + 1 are a pair
