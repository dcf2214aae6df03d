"""Write demo_batch.jsonl, the batch file that the demo submits.

126 chat requests that differ in what they ask of the machine: three classification tasks, each
behind a long few-shot prompt that all its requests share (much prefill, hardly any decode), open
questions with long answers (the other way round), and a rest that shares nothing. The order is
shuffled, as in a file that several people have filled.

    python examples/make_demo_batch.py [OUTPUT]
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
SHUFFLE_SEED = 20240611
LABEL_MAX_TOKENS = 4


def paragraphs(text: str) -> list[str]:
    """Split `text` at its blank lines and undo the line breaks inside each part."""
    return [" ".join(part.split()) for part in text.strip().split("\n\n")]


def worked_examples(text: str) -> list[tuple[str, str]]:
    """Read blocks of the form ``label: item`` as (item, label) pairs."""
    pairs = [part.split(": ", 1) for part in paragraphs(text)]
    return [(item, label) for label, item in pairs]


SENTIMENT_RULES = """\
You label product reviews for an online shop. Say whether the buyer's review is positive or
negative, in exactly one word."""

SENTIMENT_EXAMPLES = worked_examples("""
positive: I have owned four kettles in ten years and this is the first that does not drip when I
pour.

negative: The zip broke on the second day and the shop never answered my two emails.

positive: My daughter refuses to sleep without the rabbit now, so I have ordered a spare.

negative: It says waterproof on the box. It is not. My notes are now a blue soup.

positive: Arrived a week late, which annoyed me, yet the desk is so solid that I forgave them at
once.

negative: After the update the watch needs charging twice a day and the steps are pure fiction.

negative: The ladder is light and folds flat, but its feet slip on our tiles. I fell twice.

positive: Ordered in despair, used with joy: the drain is clear and the plumber stays unpaid.

negative: Beautiful on the photograph, truly. On my wall it is crooked, pale and far too small.

positive: Cuts bread like a dream. I have given one to each of my sisters.
""")

SENTIMENT_REVIEWS = paragraphs("""
The lamp gives a warm, even light and the switch has a lovely click. I read under it every night.

Three of the six glasses were chipped, and the replacement set had two more. I gave up.

Cheap tent, and now I know why: the seams leaked in the first proper shower.

I bought the pan on a whim and now it never leaves the stove. Eggs slide right off.

The manual is in a language I could not identify and the screws do not fit the holes.

Comfortable seat, smooth brakes, and it climbs our hill as if the hill were not there.

My old neighbour, who hates everything, asked me where I got this rake. Enough said.

It smelled of burning plastic after an hour, so I unplugged it and sent it back.

The camera is superb, in daylight and after sunset. My old one stays in the drawer now.

Runs quietly, fits under the sofa and found a coin I lost in spring. Delighted.

The blanket sheds so much that my black trousers look like a sheep. Never again.

The sleeves shrank by a hand's width in a cold wash. My nephew wears it now.

Fourth winter with these boots, same soles, dry feet. I wish everything were made this way.

The app demands my birthday, my location and my patience before it will boil water.

The keyboard forgets every third letter, and the number pad died within a week.

I was sceptical about a wooden toothbrush stand, and yet here I am, recommending one.

Paid for next-day delivery, waited nine days, and found a different model in the box.

The tea is excellent, fresh and strong, and the tin is too pretty to throw away.

Our dog has destroyed every toy within a day. This one is in its sixth week and still squeaks.

The pump lost pressure on the first hill and stranded me eleven kilometres from home.

Lovely notebook with creamy paper. My fountain pen has never looked so good.

It does one thing, peeling garlic, and it does that thing so well that I laughed out loud.

Support told me to turn it off and on for two weeks. In the end I turned it off for good.

The straps of the backpack tore on the third day, in the rain, far from any bus.
""")

ROUTING_RULES = """\
You sort messages that reach the help desk of a small internet provider. Name the team that must
act first, in one word: billing, technical, account or sales."""

ROUTING_EXAMPLES = worked_examples("""
technical: Since the storm the box blinks red and nothing in the flat gets online.

billing: You charged me for May twice and my bank is not amused.

account: I married last month. How do I change the surname on my contract?

sales: My brother would like the same fibre deal that I have. Is it still on?

account: I cannot log in to download the invoice, the site says unknown password.

technical: Every evening around eight the film stops to load, then runs, then stops again.

billing: Please send the refund to my new card, the old one has expired.

sales: Could I go from fifty to two hundred megabits, and what would that cost me?

technical: The screen of the new box only says "no signal from line one", whatever I plug in.

billing: My discount ended early. The offer said twelve months, your invoice says nine.

account: We move to the other end of town in August and want to take the contract with us.
""")

ROUTING_MESSAGES = paragraphs("""
The invoice for March lists a technician's visit that never took place.

My router restarts by itself whenever the microwave is running.

I am moving to Leyton Road on the twelfth and would like to keep my contract.

Do you have a cheaper plan for students? My flatmate and I would sign together.

I typed my password wrong five times and now the page is locked.

The upload has dropped to almost nothing since your people worked in our street.

Why has my monthly fee gone up by three pounds without any letter?

Please delete my late father's account. I can send the certificate.

I saw an advert for gigabit fibre. Is it available at our address?

The direct debit bounced because my salary was late. Can you try again on Friday?

The wall socket came loose and the cable inside looks bitten, perhaps by a mouse.

I would like to add my wife as a second person who may call you about the contract.

Is there a reward if I bring you three neighbours? They are all unhappy elsewhere.

You promised forty pounds back for the outage in January, and I am still waiting.

Pages load, but video calls freeze after exactly thirty seconds, on every device.

My old email address no longer exists, so I never get your confirmation codes.

We open a second cafe in autumn and need a line with a fixed address there.

Can I pay the whole year at once, and would that lower the price?

A green light, then orange, then nothing. I have swapped the power supply already.

I want to end my contract at the end of the term. Which form do you need?

Your leaflet offers a free month with television. May I add that to what I have?

My statement shows a late fee although I paid two days before the deadline.

The signal reaches the kitchen but not the bedroom, which is four steps away.

Somebody else's name appears when I sign in. Please correct it.
""")

TOPIC_RULES = """\
You file short news items for the archive of a regional paper. Answer with the topic of the item,
in one word: politics, sport, science, business or culture."""

TOPIC_EXAMPLES = worked_examples("""
sport: A goal in the final minute kept the rowing town's football club in the second division.

politics: The council voted eleven to nine for a night bus, after a debate that lasted until
midnight.

science: Divers have counted twice as many seahorses in the bay as ten years ago.

business: The last umbrella maker in the county has been sold to a chain from the capital.

culture: A forgotten opera by the town's organist will be heard again after 140 years.

politics: The mayor has withdrawn her plan for paid parking near the hospital.

sport: Two brothers crossed the channel in a canoe and missed the record by four minutes.

business: The dairy will hire sixty people, having won a contract with an airline.

science: The rabbit-proof wheat that was bred at the college has survived its second winter
outdoors.

culture: The puppet theatre will tour the villages with a play about a stubborn goose.
""")

TOPIC_ITEMS = paragraphs("""
A school team of fifteen-year-olds has won the national chess league without losing a game.

Soil samples from the old gasworks contain a bacterium that feeds on tar.

Parliament will decide in June whether sixteen-year-olds may vote in local elections.

The brewery on Mill Lane closes after 210 years because barley has become too dear.

More than four thousand visitors came to the first evening of the lantern festival.

The marathon will start an hour earlier this year because of the expected heat.

Researchers at the coast have recorded whales answering each other over ninety kilometres.

The opposition demands an inquiry into the unfinished bridge at Harrow Ferry.

A start-up that prints spare parts for tractors has found investors in three countries.

The city library shows hand-drawn maps that sailors bought in its harbour in 1740.

Cyclist Marta Lindqvist returns to racing eleven months after her fall in the mountains.

An early frost has let geologists photograph gas rising through the ice of the lake.

The governor signed the new water law on Tuesday, against the wishes of the farmers.

Rents for shops in the old town have fallen for the third year in a row.

A choir of bus drivers has been invited to sing at the theatre's anniversary.

The swimming club mourns its founder, who coached three Olympic finalists.

A telescope built by pupils has caught the shadow of a moon crossing Jupiter.

The deputy minister resigned after the report on the emergency radio network.

The shipyard has received an order for two ferries that run on batteries.

Her third novel, set in a lighthouse, has won the prize of the independent booksellers.

After extra time and eleven penalties, the visitors took the cup home.

Doctors have traced the outbreak to a single well with the help of old rainfall records.

The ruling party chose its candidate for the capital in a third round of voting.

The furniture maker will pay its suppliers weekly to keep them from leaving.
""")

OPEN_PROMPTS = paragraphs("""
Write a short story about a lighthouse keeper who finds a letter addressed to her under the
stairs.

Explain to a curious ten-year-old why the sky is blue during the day and red in the evening.

Make a plan for a weekend in the mountains with two children who do not like to walk far.

Describe how bread is made, from the flour to the crust, as if you were talking to a friend in
your kitchen.

Tell the story of a clockmaker whose clocks run backwards whenever somebody tells a lie.

I have a small balcony that gets sun only in the morning. What could I grow there, and how should
I begin?

Explain what a database index is and why it makes some questions fast and some updates slow.

Write a speech of thanks for a colleague who retires after thirty-four years in the post office.

What should a new manager do in the first month? Give reasons for every step.

Invent a legend that explains why cats and dogs do not trust each other. It should be short enough
for a bedtime, and at the end a child should be able to guess whose fault it really was.

Describe a day in the life of a bee, told by the bee. Let it begin before sunrise, let something go
wrong around noon, and let the evening end with a dance that says where the best flowers are.

How does a vaccine teach the body to defend itself? Explain it without technical words.

Plan a birthday party for someone who turns eighty and does not like surprises.

Write a letter from an old tree to the town that wants to cut it down. The tree remembers who was
kissed, who was married and who learned to climb under its branches, and it is not afraid to name
them.

Compare learning a language from books with learning it by living abroad. Which would you choose,
and for whom?

Tell me about the journey of a drop of water from a mountain spring to the sea.

A friend wants to run ten kilometres by the autumn but has never run before. Write a training plan
week by week.

Write a ghost story that takes place in a supermarket after closing time.

Explain how interest on a loan works, with an example that uses small numbers.

Describe the sounds, smells and colours of a harbour early in the morning, as they appear to
somebody who comes back after many years and does not yet know whether anyone will be waiting.

Give advice to somebody who has to speak in front of two hundred people for the first time.

Write the first page of a detective novel in which the detective is afraid of the dark.

How do airplanes stay in the air? Answer step by step and end with an experiment to try at home.

Propose five ways in which a small town could waste less food, and say who would have to help.

Tell a funny story about a robot that takes every order literally.

Why did people begin to live in cities? Discuss at least three reasons, and then argue the other
side: what did they lose when they left their villages?

Write a dialogue between the sun and the moon about who has the harder job.

Explain the rules of an imaginary board game for four players about building a railway.

Describe how to repair a flat bicycle tyre, and mention the mistakes that beginners make.

Imagine that nobody had ever invented the wheel. Describe an ordinary day in such a world.
""")

# Nothing in common, answers of a word or a sentence.
MIXED_MAX_TOKENS = [
    *(24, 32, 48, 16, 40, 48, 32, 24, 16, 48, 24, 40),
    *(16, 32, 48, 20, 36, 28, 16, 44, 24, 48, 32, 18),
]
MIXED_PROMPTS = paragraphs("""
What is the capital of Portugal, and on which river does it lie?

Translate into French: the train to the coast leaves at seven and I have no ticket.

Summarise in one sentence. The old mill at Ashby stood empty for sixty years. Its wheel had rusted,
its roof had fallen in, and the village children were told never to go near it. In 2011 a retired
engineer called Ruth Oakes bought it for the price of a used car. She spent the first winter
carrying out rubble by hand, and the second one learning from books how a waterwheel is balanced.
Neighbours brought soup, then timber, then their weekends. Four years later the wheel turned again.
Today it grinds flour on Saturdays and lights the church for the rest of the week, and the children
who were once kept away now explain it to the visitors.

What is 17 plus 26? Answer with the number only.

Give three words that rhyme with "stone" and use one of them in a sentence.

Answer the question from the text. The ferry to Skarn runs every two hours from April to October
and twice a day in winter. The crossing takes fifty minutes. Bicycles travel free of charge, dogs
need a ticket for two crowns, and cars have to be booked at least one day ahead by telephone. In a
strong westerly wind the ferry does not sail; a yellow flag on the customs house then tells
travellers to take the bus over the northern bridge, which needs about three hours. Question: how
do travellers learn that the ferry does not sail?

Write a title for an article about a baker who delivers rolls by kayak.

Who wrote the play in which a prince of Denmark speaks to the ghost of his father?

Is a tomato a fruit or a vegetable? One word.

Read this note and list the three things Ben has to buy. Hi Ben, I am stuck at work until late, so
could you look after dinner? There is still rice, and your sister left half a pumpkin in the
fridge, which has to go. We are out of coconut milk, though, and the ginger has sprouted. If the
shop on the corner is still open, please bring a bar of dark chocolate too, because it is Nina's
last evening here. Don't bother with bread, I will pick some up at the station. The cat has been
fed whatever she tells you. Love, Mum.

Complete the proverb: a stitch in time

Turn this into a polite request: Give me the report now, I have been waiting since Monday.

How many legs does a spider have?

Name the odd one out and say why: copper, iron, silver, oak, tin.

Summarise the minutes in two sentences. Present were nine of the eleven members of the allotment
society. The treasurer reported a balance of 1,240 pounds, of which 300 are set aside for the new
water pump. Mr Farouk asked whether the pump could run on solar power, and Mrs Lind offered to
collect prices before the next meeting. There was a long discussion about the hedge along the
railway line. It has grown over the path, and the railway company has written twice. The members
agreed to cut it back together on the first Saturday in October and to hire a shredder for the day.
Plot seven has been empty since May and goes to the first family on the waiting list. A proposal to
allow hens was put off, since nobody had read the by-laws. The chair thanked Mrs Brandt for the
plum cake and closed the meeting at half past eight. The next one takes place on the fifth of
November, in the community hall and not, as printed in the letter, in the school.

What does the Python expression len("blend") return?

Correct the spelling: The accomodation was definately wierd, but the neighbors recieved us warmly.

Which of these dates comes first: 3 May 1998, 30 April 1998, 1 June 1997?

What is the opposite of "generous"?

Here is a customer's story; say in one sentence what she wants. I bought a pair of walking poles in
your shop in Kendal in April. They were fine until last week, when the lower part of the left pole
slid in by itself, halfway down a wet slope, and I sat down harder than I like to at my age. Nobody
was hurt. I have cleaned the lock, tightened it, and even watched a video about it, but it still
gives way as soon as I put weight on it. I do not want my money back, since I love the grips and
they suit my height. I simply need the lower part, or the lock, or whatever it is that has worn
out, and I would rather not post the whole thing to you if a spare can be sent to me.

Convert 5 kilometres into metres and then into centimetres.

Extract the names of all persons and places from this text. In the spring of 1887 Edith Marlow left
Bristol with two trunks and a parrot, to join her uncle in Valparaiso. On the ship she met Tomas
Keller, a piano tuner from Graz, who had never seen the sea before and was ill for most of the
voyage. They wrote to each other for eleven years, she from Chile and he from Lima, before they met
a second time, by chance, at a railway station in Buenos Aires. The parrot, Admiral, outlived them
both and is said to have ended its days in a hotel in Mendoza, whistling Schubert.

Which is heavier, a kilogram of feathers or a kilogram of lead? Explain in one sentence.

Spell the word "rhythm" backwards.
""")


def request(custom_id: str, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
    """Return one line of the batch file: a greedy chat request."""
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": MODEL,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
        },
    }


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def classification(
    task: str, rules: str, examples: list[tuple[str, str]], items: list[str]
) -> list[dict[str, Any]]:
    """Return one request per item, all behind the same rules and worked examples.

    The examples are turns of the conversation: so small a model imitates those far better than
    the same examples in one long message.
    """
    shared = [message("system", " ".join(rules.split()))]
    for example, label in examples:
        shared += [message("user", example), message("assistant", label)]
    return [
        request(f"{task}-{i:02}", [*shared, message("user", item)], LABEL_MAX_TOKENS)
        for i, item in enumerate(items, 1)
    ]


def build() -> list[dict[str, Any]]:
    """Return all requests in the file's order, the same on every call."""
    lines = [
        *classification("sentiment", SENTIMENT_RULES, SENTIMENT_EXAMPLES, SENTIMENT_REVIEWS),
        *classification("routing", ROUTING_RULES, ROUTING_EXAMPLES, ROUTING_MESSAGES),
        *classification("topic", TOPIC_RULES, TOPIC_EXAMPLES, TOPIC_ITEMS),
    ]
    for i, prompt in enumerate(OPEN_PROMPTS, 1):
        # 120 to 200 tokens, spread so that neighbours in the list differ.
        lines.append(request(f"open-{i:02}", [message("user", prompt)], 120 + 10 * (i * 7 % 9)))
    mixed = zip(MIXED_MAX_TOKENS, MIXED_PROMPTS, strict=True)
    for i, (max_tokens, prompt) in enumerate(mixed, 1):
        lines.append(request(f"mixed-{i:02}", [message("user", prompt)], max_tokens))
    random.Random(SHUFFLE_SEED).shuffle(lines)
    return lines


def main(output: Path) -> None:
    """Write the batch file to `output`."""
    with output.open("w", encoding="utf-8", newline="\n") as handle:
        for line in build():
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("demo_batch.jsonl"))
