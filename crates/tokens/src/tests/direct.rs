//! The direct form of a template gives the engine's text, or leaves the work to it.

use std::collections::BTreeMap;

use super::*;
use crate::direct::run::Scratch;
use crate::template::{JINJA_PANICKED, RenderOptions};

/// Role and text.
type Turns = Vec<(&'static str, String)>;

fn conversation(rng: &mut Rng) -> Turns {
    const ROLES: [&str; 5] = ["system", "developer", "tool", "other", "user"];
    const TEXTS: [&str; 16] = [
        "",
        " ",
        "hello",
        "a word, and\nanother line\n",
        "<think>\nso\n</think>\n\nyes",
        "</think>",
        "<think>a</think>b</think>c",
        "<tool_response>\n1\n</tool_response>",
        "<tool_response>",
        "\n\n  x \t\n",
        "\u{1c}odd\u{a0}space\u{2003}",
        "{\"a\": [1, \"\\n\"]}",
        "naïve ÄÖ 你好 🏳️‍🌈",
        "don't \"quote\" \\ me",
        "{{ messages }} {% if %}",
        "x-anthropic-billing-header: 1\nrest",
    ];
    let mut turns = Vec::new();
    let content = |rng: &mut Rng| match rng.below(6) {
        0 => rough_text(rng, 8),
        1 => format!("{} {}", TEXTS[rng.below(16)], TEXTS[rng.below(16)]),
        _ => TEXTS[rng.below(16)].to_owned(),
    };
    if rng.below(3) == 0 {
        turns.push(("system", content(rng)));
    }
    let is_orderly = rng.below(3) > 0;
    for at in 0..rng.below(7) {
        let role = match (is_orderly, at % 2, rng.below(4)) {
            (true, 0, _) | (false, _, 0) => "user",
            (true, _, _) | (false, _, 1) => "assistant",
            _ => ROLES[rng.below(5)],
        };
        turns.push((role, content(rng)));
    }
    turns
}

fn body_of(turns: &Turns, rng: &mut Rng) -> String {
    let messages: Vec<String> = turns
        .iter()
        .map(|(role, content)| {
            let content = serde_json::to_string(content).unwrap();
            format!(r#"{{"role":"{role}","content":{content}}}"#)
        })
        .collect();
    let opens = ["", r#","add_generation_prompt":false"#][rng.below(2)];
    let more = [
        "",
        "",
        r#","chat_template_kwargs":{"enable_thinking":false}"#,
        r#","chat_template_kwargs":{"enable_thinking":true,"thinking":true,"n":1,"s":"x"}"#,
        r#","chat_template_kwargs":{"model_identity":"I \"am\"","deep":[1]}"#,
        r#","reasoning_effort":"none""#,
        r#","reasoning_effort":"high""#,
    ][rng.below(7)];
    format!(r#"{{"messages":[{}]{opens}{more}}}"#, messages.join(","))
}

/// The templates of the tests and of the demo, and that of Qwen 3 where it is.
fn all_templates() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for folder in ["templates", "plain"] {
        let folder = repository().join("tests/data/tokenizer").join(folder);
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            found.push((name, std::fs::read_to_string(&path).unwrap()));
        }
    }
    let demo = include_str!("../../assets/demo/chat_template.jinja");
    found.push(("demo".to_owned(), demo.to_owned()));
    let qwen = repository().join("target/tokenizers/qwen3/tokenizer_config.json");
    if let Ok(text) = std::fs::read_to_string(qwen) {
        let config: serde_json::Value = serde_json::from_str(&text).unwrap();
        let source = config["chat_template"].as_str().unwrap().to_owned();
        found.push(("Qwen 3".to_owned(), source));
    }
    assert!(found.len() > 10, "{}", found.len());
    found.sort();
    found
}

fn templates_of(source: &str, steps_max: u64) -> Templates {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    let tokens = tokens.map(|(name, text)| (name.to_owned(), text.to_owned())).to_vec();
    let render = RenderOptions {
        output_bytes_max: 1 << 20,
        steps_max,
        clock: options().clock,
        content_format: None,
        trust_request_template: false,
    };
    Templates::new(vec![("default".to_owned(), source.to_owned())], tokens, render).unwrap()
}

/// What became of the conversations of one template.
#[derive(Debug, Default)]
struct Ways {
    direct: usize,
    /// Texts of the engine, by why it was asked.
    by_jinja: BTreeMap<&'static str, usize>,
    refused: usize,
}

fn jinja_panicked() -> Result<(), TokensError> {
    Err(TokensError::Template { message: JINJA_PANICKED.to_owned() })
}

fn compare(name: &str, source: &str, seed: u64, rounds: usize) -> Ways {
    let templates = templates_of(source, 1_000_000);
    let mut rng = Rng::seeded(seed);
    let mut ways = Ways::default();
    let (mut direct, mut engine, mut scratch) = (String::new(), String::new(), Scratch::default());
    for round in 0..rounds {
        let turns = conversation(&mut rng);
        let json = body_of(&turns, &mut rng);
        let body = request::parse(Api::ChatCompletions, json.as_bytes()).unwrap();
        let Prompt::Chat(chat) = &body.prompt else { panic!("no conversation") };
        let want = templates.render_by_jinja(chat, &mut engine);
        match templates.render_direct(chat, &mut direct, &mut scratch) {
            // Without messages, Python gives an empty list backwards.
            Ok(()) if want == jinja_panicked() && turns.is_empty() => ways.direct += 1,
            Ok(()) => {
                assert_eq!(want, Ok(()), "{name}, seed {seed} round {round}: {json}");
                assert_eq!(direct, engine, "{name}, seed {seed} round {round}: {json}");
                ways.direct += 1;
            }
            Err(_) if want.is_err() => ways.refused += 1,
            Err(why) => *ways.by_jinja.entry(why.0).or_default() += 1,
        }
    }
    ways
}

/// Why conversations go to the engine whatever the template is.
const WHATEVER_THE_TEMPLATE: [&str; 2] = ["chat_template_kwargs", "messages that are rewritten"];

#[test]
fn the_direct_form_gives_the_text_of_the_engine() {
    for (name, source) in all_templates() {
        let ways = compare(&name, &source, 5, 300);
        let left = ways.by_jinja.keys().filter(|why| !WHATEVER_THE_TEMPLATE.contains(*why));
        let is_direct = ways.direct >= 130 && left.count() == 0;
        // They print dicts and floats, and filter with `indent`.
        let is_odd = matches!(name.as_str(), "python.jinja" | "thinking.jinja");
        println!("{name}: {ways:?}");
        assert!(is_direct != is_odd, "{name}: {ways:?}");
    }
}

const ATOMS: &str = "messages;messages[0];messages[-1].content;messages[1]['role'];nothing;none;\
    messages[0].nothing;true;false;0;1;-3;7;'';' a b ';'é\\n';'a';'content';['a', 'b', 'a'];\
    [1, 2];('a', 1);ns;ns.text;loop;loop.index0";
const OPERATORS: &str = "+;~;-;*;//;%;==;!=;<;>=;in;not in;and;or";
const FILTERS: &str = "trim;length;upper;lower;string;first;last;list;reverse;tojson;join;\
    default('d');default('d', true);join('-');replace('a', 'xy');trim('a ');\
    selectattr('role', 'equalto', 'user');rejectattr('role', 'equalto', 'user') | list";
const METHODS: &str = "startswith('a');endswith('\\n');strip();lstrip('a');rstrip();split('a');\
    split(' ', 1);replace('a', '');upper();lower();removeprefix(' ');removesuffix(' ');\
    get('role');get('x', 1)";
const PLACES: &str = "0;1;-1;5;4294967295;'role';'a';1:;:1;::-1;-2:;:-1;1:3;2:1;-9:9;::1;::2";
const TESTS: &str = "defined;undefined;none;string;number;integer;boolean;mapping;iterable;\
    sequence;true;false;eq 'a';in 'abc';odd;even;divisibleby 3;not none";

/// A random expression, as deep as `depth`.
fn expression(rng: &mut Rng, depth: u64) -> String {
    let one = |rng: &mut Rng, list: &'static str| {
        let list: Vec<&str> = list.split(';').collect();
        list[rng.below(list.len())].trim_start()
    };
    if depth == 0 {
        return one(rng, ATOMS).to_owned();
    }
    let a = expression(rng, depth - 1);
    let b = if rng.below(2) == 0 { 0 } else { depth - 1 };
    let b = expression(rng, b);
    match rng.below(8) {
        0 | 1 => format!("({a} {} {b})", one(rng, OPERATORS)),
        2 => format!("({a} if {b} else {})", one(rng, ATOMS)),
        3 => format!("({a} | {})", one(rng, FILTERS)),
        4 => format!("({a}).{}", one(rng, METHODS)),
        5 if rng.below(4) == 0 => format!("({a})[{b}]"),
        5 => format!("({a})[{}]", one(rng, PLACES)),
        6 => format!("({a} is {})", one(rng, TESTS)),
        _ => format!("({}{a})", one(rng, "not ;-")),
    }
}

/// Prints a value `v`, whatever it is.
const SHOW: &str = "{{ v if v is string or v is number or v is none }}
    {{ v | length if v is string }}{{ 'yes' if v else 'no' }}
    {% if v is iterable and not (v is string or v is mapping) %}
        {% for x in v if x is string %}{{ x ~ loop.index }},{% endfor %}
    {% endif %}";

#[test]
fn expressions_mean_what_they_mean_to_the_engine() {
    let json = r#"{"messages":[{"role":"system","content":" ab a\n"},
        {"role":"user","content":"é a"},{"role":"assistant","content":""},
        {"role":"user","content":"a"}]}"#;
    let body = request::parse(Api::ChatCompletions, json.as_bytes()).unwrap();
    let Prompt::Chat(chat) = &body.prompt else { panic!("no conversation") };
    let (seed, rounds) = (11, 1200);
    let mut rng = Rng::seeded(seed);
    let (mut direct, mut engine, mut scratch) = (String::new(), String::new(), Scratch::default());
    let (mut alike, mut left) = (0, 0);
    for round in 0..rounds {
        let depth = 1 + rng.below(3) as u64;
        let expression = expression(&mut rng, depth);
        // What no probe has keeps the form alive whatever the expression is.
        let source = format!(
            "{{% set ns = namespace(text='t a', n=2) %}}{{% for m in messages %}}\
             {{% if messages | length == 4 %}}{{% set v = {expression} %}}{SHOW}{{% endif %}};\
             {{% endfor %}}"
        );
        let templates = templates_of(&source, 10_000);
        let want = templates.render_by_jinja(chat, &mut engine);
        match templates.render_direct(chat, &mut direct, &mut scratch) {
            Err(_) => left += 1,
            // An empty list backwards.
            Ok(()) if want == jinja_panicked() => {}
            Ok(()) => {
                assert_eq!(want, Ok(()), "seed {seed} round {round}: {expression}");
                assert_eq!(direct, engine, "seed {seed} round {round}: {expression}");
                alike += 1;
            }
        }
    }
    println!("{alike} alike, {left} left to the engine");
    assert!(alike > 150, "{alike} of {rounds} were compared");
}

#[test]
fn a_namespace_for_each_of_many_messages_is_left_to_the_engine() {
    let source = "{% for m in messages %}{% set ns = namespace(x=m.content) %}{{ ns.x }}\
                  {% endfor %}";
    let templates = templates_of(source, 1_000_000);
    let (mut direct, mut engine, mut scratch) = (String::new(), String::new(), Scratch::default());
    for (messages, is_direct) in [(100, true), (1000, false)] {
        let message = r#"{"role":"user","content":"a"}"#;
        let json = format!(r#"{{"messages":[{}]}}"#, vec![message; messages].join(","));
        let body = request::parse(Api::ChatCompletions, json.as_bytes()).unwrap();
        let Prompt::Chat(chat) = &body.prompt else { panic!("no conversation") };
        assert_eq!(templates.render_by_jinja(chat, &mut engine), Ok(()));
        let rendered = templates.render_direct(chat, &mut direct, &mut scratch);
        assert_eq!(rendered.is_ok(), is_direct, "{messages} messages: {rendered:?}");
        assert!(!is_direct || direct == engine, "{direct}");
    }
}
