"""Objects of the scenes: emoji characters and their common names.

A character is given by its Unicode name, followed by ``=`` and its common name if they differ. The
list contains objects that are easy to name from a small picture: no people, no signs, and no two
objects with the same common name except on purpose (two apples, two fish). All are in Unicode 13,
and thus in Python 3.10.
"""

from __future__ import annotations

import unicodedata

# Objects with characteristic colours, which must not change.
_TRUE_COLORED = """
red apple = apple, green apple = apple, pear, banana, pineapple, strawberry,
grapes = bunch of grapes, watermelon = slice of watermelon, tangerine, lemon, kiwifruit = kiwi,
tomato, aubergine = eggplant, carrot, ear of maize = corn cob, avocado, broccoli,
hot pepper = chili pepper, mushroom, croissant, pretzel, cheese wedge = cheese, hamburger,
slice of pizza, hot dog, soft ice cream = ice cream cone, doughnut = donut, cookie, lollipop,
birthday cake, egg, cooking = frying pan, hot beverage = cup of coffee, beer mug,

tiger, rabbit, cat, crocodile, whale, snail, snake, horse, sheep, monkey, rooster, dog, pig,
elephant, octopus, honeybee = bee, lady beetle = ladybug, fish, tropical fish = fish, turtle,
baby chick = chick, penguin, dolphin, dromedary camel = camel, chipmunk = squirrel, spider, crab,
butterfly, giraffe face = giraffe, parrot, flamingo, owl, duck, sauropod = dinosaur,
frog face = frog, fox face = fox, panda face = panda, lion face = lion,

cactus, evergreen tree = pine tree, palm tree, tulip, sunflower,

fire engine, ambulance, rocket, airplane,

snowman, soccer ball, basketball and hoop = basketball, american football = football,
jack-o-lantern = pumpkin, saxophone, trophy, house building = house, european castle = castle,
crown, electric light bulb = light bulb, television, key, lock = padlock, bell, hammer,
fire extinguisher, teddy bear, chair, robot face = robot, earth globe europe-africa = globe,
game die = dice, ring buoy = lifebuoy, toilet, camera
"""

# Objects that exist in any colour.
_ANY_COLORED = """
automobile = car, bus, delivery truck = truck, tractor, racing car = race car,
racing motorcycle = motorcycle, steam locomotive = steam train, helicopter, sailboat, speedboat,
skateboard,

umbrella, black telephone = telephone, black scissors = pair of scissors, pencil, balloon,
wrapped present = gift, school satchel = backpack, guitar, drum with drumsticks = drum, t-shirt,
dress, handbag, athletic shoe = sneaker, hiking boot = boot, billed cap = baseball cap,
gem stone = diamond, bucket, luggage = suitcase, kite, closed book = book, tent, teapot, magnet
"""


def _characters(listing: str) -> dict[str, str]:
    """Return character -> name for a list in the format above."""
    pairs = (entry.strip().partition(" = ") for entry in " ".join(listing.split()).split(","))
    return {
        unicodedata.lookup(unicode_name): name or unicode_name for unicode_name, _, name in pairs
    }


TRUE_COLORED_CHARACTERS = _characters(_TRUE_COLORED)
ANY_COLORED_CHARACTERS = _characters(_ANY_COLORED)
CHARACTERS = TRUE_COLORED_CHARACTERS | ANY_COLORED_CHARACTERS  # character -> name

# Alphabetical: the index in this tuple is the index of a concept.
OBJECT_NAMES: tuple[str, ...] = tuple(sorted(set(CHARACTERS.values())))
