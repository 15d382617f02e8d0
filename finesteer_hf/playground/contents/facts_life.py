"""Misconceptions about living things and daily life: (subject, folklore, truth) for five kinds.

Both clauses are lower-case sentences without a full stop and of about equal length, so that length does not separate
truth from folklore. A subject belongs to one fact only.
"""

from __future__ import annotations


Fact = tuple[str, str, str]

BODY: tuple[Fact, ...] = (
    ("cracking knuckles", "cracking knuckles gives you swollen joints", "cracking knuckles only pops gas bubbles"),
    ("catching a cold", "cold air alone gives you a cold", "a cold comes from a virus"),
    ("shaved hair", "shaved hair grows back thicker", "shaved hair grows back the same"),
    ("the tongue", "each taste has its own place on the tongue", "every part of the tongue senses each taste"),
    ("the brain", "we use only a tenth of the brain", "we use almost all of the brain"),
    ("swallowed gum", "swallowed gum stays inside for seven years", "swallowed gum leaves the body in days"),
    ("reading in dim light", "dim light ruins your eyes for good", "dim light tires your eyes for hours"),
    ("wet hair", "wet hair makes you ill in winter", "wet hair makes you cold in winter"),
    ("fingernails", "fingernails keep growing after death", "skin shrinks around fingernails after death"),
    ("sugar and children", "sugar makes children run wild", "sugar leaves children quite calm"),
    ("a fever", "you must starve a fever", "you should feed a fever"),
    ("swimming after lunch", "a swim after lunch brings deadly cramps", "a swim after lunch is quite safe"),
    ("warts", "warts come from touching a toad", "warts come from a human virus"),
    ("blue veins", "blood inside the veins is blue", "blood inside the veins is red"),
    ("body heat", "most body heat leaves through the head", "body heat leaves through any bare skin"),
    ("a grey hair", "pulling a grey hair makes two more grow", "pulling a grey hair leaves the others alone"),
    ("drinking water", "you must drink eight glasses a day", "your thirst tells you what you need"),
    ("crossed eyes", "crossed eyes can stay that way forever", "crossed eyes always relax after a moment"),
    ("sneezing", "the heart stops for every sneeze", "the heart keeps beating through a sneeze"),
    ("creative people", "creative people use only the right brain", "creative people use both halves equally"),
)

FOOD: tuple[Fact, ...] = (
    ("carrots", "carrots let you see in the dark", "carrots only keep healthy eyes healthy"),
    ("spinach", "spinach holds more iron than meat", "spinach holds rather little usable iron"),
    ("seared meat", "a hot pan seals the juices in", "a hot pan gives taste and colour"),
    ("bread crust", "bread crust makes your hair curly", "bread crust feeds like the crumb"),
    ("coffee", "coffee stops children from growing", "coffee leaves children growing fine"),
    ("brown eggs", "brown eggs are better for your health", "brown eggs come from other hens"),
    ("night meals", "bread eaten late turns straight to fat", "bread counts the same at any hour"),
    ("chocolate", "chocolate covers your face with spots", "chocolate rarely covers anyone with spots"),
    ("salted water", "salt makes the pot boil much sooner", "salt makes the pot boil slightly later"),
    ("honey", "old honey becomes a strong poison", "sealed honey stays good for years"),
    ("raw milk", "raw milk heals a weak stomach", "raw milk can carry dangerous germs"),
    ("fish dinners", "fish makes you clever before a test", "fish is a good and simple meal"),
    ("spicy soup", "spicy soup burns holes in the stomach", "spicy soup warms and does no harm"),
    ("mushrooms", "a silver spoon turns black on bad mushrooms", "no spoon can tell you about bad mushrooms"),
    ("frozen peas", "frozen peas have lost all their good", "frozen peas keep nearly all their good"),
    ("dark bread", "dark bread has no sugar in it", "dark bread may get colour from syrup"),
    ("lemon water", "lemon water washes poison from the body", "lemon water tastes fresh and cleans nothing"),
    ("butter on burns", "cold butter takes pain from a burn", "cool water takes pain from a burn"),
    ("cheese at night", "cheese at night brings terrible dreams", "cheese at night leaves dreams alone"),
    ("celery", "celery burns more than it gives", "celery gives more than it burns"),
)

ANIMALS: tuple[Fact, ...] = (
    ("goldfish", "goldfish forget everything in three seconds", "goldfish remember their feeder for months"),
    ("ostriches", "ostriches hide their heads in the sand", "ostriches lie flat when they are afraid"),
    ("bats", "bats are blind as stones", "bats see rather well indeed"),
    ("bulls", "bulls grow angry when they see red", "bulls grow angry when the cloth moves"),
    ("lemmings", "lemmings jump from cliffs to die", "lemmings wander far to find food"),
    ("camels", "camels store water in the hump", "camels store fat in the hump"),
    ("old dogs", "old dogs cannot learn new tricks", "old dogs can learn new tricks"),
    ("dog years", "one year of a dog equals seven of ours", "a young dog ages fast and then slowly"),
    ("cats", "cats always land safely on their feet", "cats often get hurt in a high fall"),
    ("wolves", "wolves howl at the full moon", "wolves howl to call the pack"),
    ("touched chicks", "a mother bird leaves a chick you touched", "a mother bird keeps a chick you touched"),
    ("elephants", "elephants are scared of every mouse", "elephants mind any sudden small movement"),
    ("chameleons", "chameleons copy any colour behind them", "chameleons change colour with mood and heat"),
    ("earthworms", "a cut earthworm becomes two worms", "a cut earthworm rarely lives at all"),
    ("sharks", "sharks can never fall ill", "sharks fall ill like other fish"),
    ("owls", "owls can turn their heads fully around", "owls can turn their heads partly around"),
    ("bees", "every bee dies after one sting", "only honey bees die after one sting"),
    ("mice", "mice love cheese above all else", "mice prefer grain and sweet seeds"),
    ("snakes", "snakes dance to the music of a flute", "snakes follow the swaying of a flute"),
    ("porcupines", "porcupines shoot their quills at you", "porcupines lose quills only when touched"),
)

PLANTS: tuple[Fact, ...] = (
    ("moss", "moss grows only on the north side", "moss grows on any damp side"),
    ("potted ferns", "ferns in the bedroom steal your air", "ferns in the bedroom use little air"),
    ("ivy", "ivy pulls down every wall it climbs", "ivy harms only walls with old cracks"),
    ("sunflowers", "grown sunflowers follow the sun all day", "grown sunflowers face the east all day"),
    ("wild berries", "berries eaten by birds are safe for you", "berries eaten by birds may poison you"),
    ("cactus", "a cactus holds clean water to drink", "a cactus holds bitter and harmful juice"),
    ("noon watering", "drops on leaves burn them at noon", "drops on leaves dry before they burn"),
    ("talking to roses", "roses bloom sooner if you praise them", "roses bloom sooner if you feed them"),
    ("pruned trees", "tar on a cut heals the tree", "a clean cut heals without any tar"),
    ("oak trees", "oaks draw all lightning to themselves", "lightning strikes any tall lonely tree"),
    ("bananas", "bananas grow on a tall hard tree", "bananas grow on a giant soft herb"),
    ("peanuts", "peanuts are nuts that grow on trees", "peanuts are beans that grow underground"),
    ("flytraps", "flytraps can eat a whole finger", "flytraps can eat only small insects"),
    ("poinsettia", "one poinsettia leaf can kill a child", "one poinsettia leaf may upset a stomach"),
    ("planting by moonlight", "seeds sown at full moon grow best", "seeds sown in warm soil grow best"),
    ("rice fields", "rice needs standing water to live", "rice can live without standing water"),
    ("tree roots", "roots go as deep as the tree is tall", "roots spread wide and stay rather shallow"),
    ("autumn leaves", "frost paints the autumn leaves red", "short days paint autumn leaves red"),
    ("four leaf clover", "clover with four leaves grows under rainbows", "clover with four leaves is a rare accident"),
    ("bamboo", "bamboo is a kind of thin tree", "bamboo is a kind of tall grass"),
)

LUCK: tuple[Fact, ...] = (
    ("broken mirrors", "a broken mirror brings seven bad years", "a broken mirror brings only sharp glass"),
    ("black cats", "a black cat on your path means trouble", "a black cat on your path means nothing"),
    ("the number thirteen", "thirteen guests bring death to the table", "thirteen guests just need one more chair"),
    ("horseshoes", "a horseshoe on the door catches fortune", "a horseshoe on the door catches rust"),
    ("ladders", "a walk under ladders ruins your week", "a walk under ladders risks falling paint"),
    ("spilled salt", "spilled salt must fly over your shoulder", "spilled salt must simply be swept up"),
    ("lottery numbers", "numbers missing for long are due soon", "numbers missing for long are no likelier"),
    ("coin tosses", "after five heads a tail must follow", "after five heads both sides are equal"),
    ("hot dice", "a player on a streak keeps winning", "a player on a streak may lose next"),
    ("wishing wells", "a coin in the well grants a wish", "a coin in the well stays a coin"),
    ("itchy palms", "an itchy palm announces new money", "an itchy palm announces dry skin"),
    ("umbrellas indoors", "an umbrella opened inside calls misfortune", "an umbrella opened inside hits lamps"),
    ("knocking on wood", "a knock on wood keeps harm away", "a knock on wood only calms the mind"),
    ("full moon nights", "births and crimes rise at full moon", "births and crimes ignore the full moon"),
    ("star signs", "your star sign decides whom you love", "your star sign decides nothing about love"),
    ("palm lines", "a long palm line gives a long life", "a long palm line is merely a fold"),
    ("dreams of teeth", "a dream of teeth foretells a death", "a dream of teeth foretells nothing real"),
    ("friday travel", "a trip begun on friday goes wrong", "a trip begun on friday goes fine"),
    ("lucky socks", "unwashed socks win the next game", "unwashed socks smell in the next game"),
    ("tea leaves", "tea leaves draw the coming year", "tea leaves draw nothing but stains"),
)
