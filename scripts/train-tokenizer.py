#!/usr/bin/env python3
"""Makes the small tokenizer in crates/tokens/assets/demo.

    pip install tokenizers==0.23.3
    python3 scripts/train-tokenizer.py

Byte-level BPE with the pre-tokenizer of Qwen 2 and ChatML tokens, trained on sentences that this
script makes from its own word lists with a fixed seed: the same input gives the same bytes. The
words, the text and the result are part of this project and under its licence.
"""

import json
import pathlib
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors, trainers

VOCABULARY = 3000
OUT = pathlib.Path(__file__).resolve().parent.parent / "crates" / "tokens" / "assets" / "demo"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PLAIN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

NOUNS = """
answer apple archive area argument arrow article assistant author autumn balance bank basin basket
beach bicycle bird block board boat book border bottle branch bread bridge budget building button
cable cache camera candle canyon carpet castle cedar center chain chair chapter circle city class
client cloud cluster coast coffee color column command company computer context corner country
course cradle customer data day decision delta desert design detail device dinner direction
document dog door dream drive duty earth edge effort ember engine error evening event example
factory family farmer feature field figure file finger fire fish fjord flag floor flower folder
forest form fountain friend function future garden gate gift glass goal granite grass grove guide
hammer hand harbor harvest head heart heat hill history home horizon hour house hunter idea image
index input insect island item journey jungle kernel key king kitchen ladder lagoon lake lamp
language layer leader leaf learner lesson letter level library light limit line list location lock
machine manager map market matter meadow measure medicine memory message metal method midnight
minute mirror model moment money month moon morning motor mountain mouse museum music name nation
nectar network news night north note number object ocean office oil operator orange orchid order
output owner page paint paper parent park part path pattern payment pencil people picture piece
pilot place plan planet plant plate player pocket poem point policy pool prairie prefix price
problem process product program project prompt proof property quarter quartz question queue radio
rain range rate reader reason record region reply report request result rice river road rocket room
root route router row rule sailor salt sample sand scale school science score screen sea season
section seed sentence sequence series server service shadow shape shell ship shop side signal
silver sister size sky snow soil song source south space speaker speed spring square stage star
state station step stone store storm story street student summer summit sun supper surface switch
system table task teacher team temple test text thing thought thread thunder ticket tide time token
tool topic tower town track trade train travel tree trip trouble truth tundra turn type umber unit
user valley value vector version view village visitor voice volume wagon wall watch water wave
weather week west wheel willow wind window winter wire wonder wood word work worker world writer
xenon yard year yonder zephyr zone
""".split()
VERBS = """
accept add agree allow appear apply arrive ask avoid become begin believe belong bring build buy
call carry change check choose clean clear close collect come compare complete connect consider
contain continue copy count cover create cross decide deliver depend describe develop discover
discuss draw drop eat enter examine exist expect explain fall feel fill find finish fit follow
forget form gather get give go grow happen hear help hold hope imagine improve include increase
inform join jump keep know lead learn leave let like list listen live look lose make manage mark
mean measure meet mention miss move name need notice offer open own pass pay perform pick plan play
point prefer prepare present press produce protect prove provide pull push put raise reach read
receive remain remember remove repeat replace report require rest return ride rise run save say
search see seem sell send serve set share show sign sing sit sleep solve speak spend stand start
stay stop study suggest support take talk teach tell thank think throw touch trust try turn
understand use visit wait walk want wash wear win wish work write
""".split()
ADJECTIVES = """
able active ancient annual bitter blue bold brave brief bright broad brown busy calm careful cheap
clean clear clever cold common complete cool correct curious daily dark dear deep different direct
distant dry eager early eastern easy empty equal exact fair famous fast final fine firm first flat
free fresh friendly full gentle glad golden good grand gray great green happy hard heavy helpful
high honest hot huge human important kind large last late lazy light little local lonely long loud
low lucky main major modern narrow native natural near neat new next nice noisy normal northern old
open orange ordinary other pale patient perfect plain pleasant polite poor popular possible private
proper proud public quick quiet rapid rare ready real recent red regular rich right rough round safe
same serious shallow sharp short silent simple slow small smart smooth soft solid southern special
steady strange strong sudden sure sweet tall thick thin tiny total true typical unique usual useful
various warm weak western wet white whole wide wild wise wooden wrong yellow young
""".split()
SMALL = """
the of and to in that is was for it with as his on be at by had not are but from or have an they
which one you were her all she there would their we him been has when who will more no if out so
said what up its about into than them can only other new some could these two may then do first any
my now such like our over me even most made after also did many before must through back years where
much your way well down should because each just those how too own under here please never always
""".split()
RULES = [
    "You are a careful assistant. Follow these rules.",
    "You are a helpful assistant. Answer in one short paragraph, and say so when you are not sure.",
    "Read the document and answer the question that follows it.",
    "Do not invent facts. If the answer is not in the text, reply that you don't know.",
    "The user's name isn't known; you'll address them politely and they've asked for brevity.",
    "Write a function that returns the longest common prefix of two lists, and test it.",
    "Summarize the conversation above in three points, the most important one first.",
    "Translate the sentence into English, then list every word you weren't sure about.",
]
OTHER = [
    "Grüße aus München, schönes Wetter über den Bergen; wir können später darüber sprechen.",
    "Où est la bibliothèque ? Elle est à côté de l'école, près du café français.",
    "El niño comió mañana una manzana pequeña; ¿dónde está el corazón de la canción?",
    "Привет, как дела? Сегодня хорошая погода, и мы идем в город.",
    "你好，世界。今天的天气很好，我们去公园吧。请回答下面的问题。",
    "こんにちは、世界。今日はとても良い天気ですね。質問に答えてください。",
    "안녕하세요 세계. 오늘 날씨가 좋습니다.",
    "नमस्ते दुनिया। مرحبا بالعالم. שלום עולם.",
]
CODE = [
    "def {a}_{b}({c}, {d}=None):\n    for {e} in range(len({c})):\n        if {c}[{e}] != {d}:\n"
    "            return {{'{a}': {e}, \"{b}\": True}}\n    raise ValueError(f\"no {a} in {c}\")\n",
    "pub fn {a}_{b}(&self, {c}: &str) -> Result<Vec<u32>, Error> {{\n    let mut {d} = Vec::new();\n"
    "    while let Some({e}) = {c}.next() {{\n        {d}.push({e} + 1);\n    }}\n    Ok({d})\n}}\n",
    "SELECT {a}, COUNT(*) FROM {b} WHERE {c} >= {n} AND {d} = '{e}' GROUP BY {a} ORDER BY 2 DESC;\n",
    "{{\"{a}\": {n}, \"{b}\": [\"{c}\", \"{d}\"], \"{e}\": {{\"type\": \"string\", \"ok\": true}}}}\n",
    "{{\"type\": \"function\", \"function\": {{\"name\": \"get_{a}\", \"description\": \"Get the {b}\","
    " \"parameters\": {{\"type\": \"object\", \"properties\": {{\"{c}\": {{\"type\": \"string\"}}}},"
    " \"required\": [\"{c}\"]}}}}}}\n",
    "# {a}\n\n- **{b}**: the `{c}` of the {d}\n- see [{e}](https://example.com/{a}/{b}.html)\n\n",
    "<div class=\"{a}\"><a href=\"/{b}/{c}\">{d}</a></div>\n    </{e}>\n",
]


def corpus(rng):
    """Sentences, code and text in other scripts, one string each."""
    word = lambda: rng.choice(rng.choice([NOUNS, NOUNS, VERBS, ADJECTIVES, SMALL, SMALL]))
    lines = []
    for _ in range(6000):
        words = [word() for _ in range(rng.randint(5, 16))]
        sentence = " ".join(words)
        lines.append(sentence[0].upper() + sentence[1:] + rng.choice([".", ".", "?", "!", ",", ":"]))
    for _ in range(1200):
        lines.append(" ".join(f"{rng.choice(NOUNS)}{rng.choice(['', '', rng.randint(1, 99)])}"
                              for _ in range(20)))
    for words in (NOUNS, VERBS, ADJECTIVES, SMALL):
        lines += [f"{w} {w} The {w} {w.capitalize()} {w}" for w in words]
        lines += [f"{w}s {w}ing {w}ed {w}er" for w in words]
    for _ in range(500):
        names = dict(zip("abcde", rng.sample(NOUNS, 5)))
        lines.append(rng.choice(CODE).format(n=rng.randint(0, 9999), **names))
    lines += (RULES * 40) + (OTHER * 6)
    lines += ["user\n", "assistant\n", "system\n", "tool\n", "\n\n", "Question: ", "Answer: "] * 50
    return lines


def main():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    added = SPECIAL + PLAIN
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(added),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(random.Random(1)), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    assert tokenizer.get_vocab_size() == VOCABULARY, tokenizer.get_vocab_size()
    OUT.mkdir(parents=True, exist_ok=True)
    text = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (OUT / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    config = {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 32768,
    }
    (OUT / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
