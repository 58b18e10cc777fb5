mod chains;
mod direct;

use std::path::{Path, PathBuf};

use kvroute_core::rng::Rng;
use kvroute_wire::api::Api;
use kvroute_wire::request;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::*;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn options() -> TokenizerOptions {
    TokenizerOptions {
        // 2026-11-22 16:12:58, as in golden.py.
        clock: Clock::Fixed { seconds: 1_795_363_978 },
        ..TokenizerOptions::default()
    }
}

fn with_template(source: &str) -> Tokenizer {
    let options = TokenizerOptions { chat_template: Some(source.to_owned()), ..options() };
    Tokenizer::demo_with(&options).unwrap()
}

fn render(tokenizer: &Tokenizer, body: &str) -> Result<String, TokensError> {
    let body = request::parse(Api::ChatCompletions, body.as_bytes()).unwrap();
    match &body.prompt {
        Prompt::Chat(chat) => tokenizer.render_chat(chat),
        other => panic!("no conversation: {other:?}"),
    }
}

#[derive(Deserialize)]
struct Group<'a> {
    template: &'a str,
    #[serde(borrow)]
    cases: Vec<Case<'a>>,
}

#[derive(Deserialize)]
struct Case<'a> {
    name: &'a str,
    /// Raw: the order of keys matters.
    #[serde(borrow)]
    body: &'a RawValue,
    /// `None` where vLLM refuses the request.
    expected: Option<String>,
}

/// The conversations of `tests/data/tokenizer/golden.json`, rendered by vLLM and transformers.
#[test]
fn templates_render_as_in_vllm() {
    let folder = repository().join("tests/data/tokenizer");
    let golden = std::fs::read_to_string(folder.join("golden.json")).unwrap();
    let groups: Vec<Group<'_>> = serde_json::from_str(&golden).unwrap();
    let mut count = 0;
    for group in groups {
        let name = group.template;
        let source = std::fs::read_to_string(folder.join("templates").join(name)).unwrap();
        // The generator names these two tokens.
        let source = format!(
            "{{%- set bos_token = '<|endoftext|>' %}}{{%- set eos_token = '<|im_end|>' -%}}{source}"
        );
        let tokenizer = with_template(&source);
        for case in group.cases {
            let got = render(&tokenizer, case.body.get());
            match &case.expected {
                Some(want) => assert_eq!(got.as_ref(), Ok(want), "{name}: {}", case.name),
                None => assert!(got.is_err(), "{name}: {}: {got:?}", case.name),
            }
            count += 1;
        }
    }
    assert!(count >= 25, "only {count} conversations");
}

/// Rough text: words, scripts, special tokens, white space of all kinds, long runs.
fn rough_text(rng: &mut Rng, parts: u64) -> String {
    const PARTS: [&str; 32] = [
        " the",
        " router",
        "block",
        "Word",
        " don't",
        "'LL",
        " 12345",
        "3.14",
        "\n",
        "\n\n ",
        "  ",
        "\t",
        "\r\n",
        " {\"a\": [1, 2]}",
        "::<>()",
        "/path/to",
        "é",
        "e\u{301}",
        "你好。",
        "こんにちは",
        "Привет ",
        "🏳️‍🌈",
        "\u{a0}",
        "\u{200b}",
        "<|im_start|>",
        "<|im_end|>",
        "<|im_",
        "<think>",
        "</tool_call>",
        "ſ",
        "İ",
        "<|endoftext|>",
    ];
    let mut text = String::new();
    for _ in 0..parts {
        match rng.below(12) {
            0 => text.extend(char::from_u32(rng.below(0x3000) as u32)),
            1 => text.push_str(&"a".repeat(rng.below(40))),
            2 => text.push_str(&" ".repeat(rng.below(6))),
            _ => text.push_str(PARTS[rng.below(PARTS.len())]),
        }
    }
    text
}

/// The cache and the cuts change nothing: pieces, seen before or not, give the ids of the whole.
fn check_pieces(tokenizer: &Tokenizer, seed: u64, rounds: u64) {
    let mut rng = Rng::seeded(seed);
    let mut shared = vec![String::new()];
    for round in 0..rounds {
        let parts = [0, 3, 40, 3000][rng.below(4)];
        let mut text = shared[rng.below(shared.len())].clone();
        text.push_str(&rough_text(&mut rng, parts));
        let whole = tokenizer.inner.model.encode_whole(&text).unwrap();
        for sight in ["first", "second"] {
            let got = tokenizer.encode(&text, false).unwrap();
            assert!(got == whole, "seed {seed} round {round}, {sight} sight: {text:?}");
        }
        if shared.len() < 8 && text.len() < 30_000 {
            shared.push(text);
        }
    }
}

#[test]
fn pieces_and_cache_give_the_ids_of_the_whole() {
    for cache_bytes_max in [0, 64 << 10, 16 << 20] {
        let options = TokenizerOptions { cache_bytes_max, ..options() };
        let tokenizer = Tokenizer::demo_with(&options).unwrap();
        check_pieces(&tokenizer, 7 + cache_bytes_max as u64, 100);
        let stats = tokenizer.cache_stats();
        assert_eq!(stats.bytes_max, cache_bytes_max);
        assert!(stats.bytes <= cache_bytes_max);
        assert_eq!(stats.hits > 20, cache_bytes_max > 0, "{stats:?}");
    }
}

#[test]
fn a_shared_system_prompt_is_tokenized_once() {
    let tokenizer = Tokenizer::demo();
    let system = "You are a careful assistant. ".repeat(900);
    let ask = |question: &str| {
        let body = format!(
            r#"{{"messages": [{{"role": "system", "content": {system:?}}},
                {{"role": "user", "content": {question:?}}}]}}"#
        );
        let body = request::parse(Api::ChatCompletions, body.as_bytes()).unwrap();
        tokenizer.tokens_of(&body).unwrap()
    };
    ask("first question");
    let before = tokenizer.cache_stats().miss_bytes;
    ask("another question");
    let fresh = tokenizer.cache_stats().miss_bytes - before;
    assert!(fresh < 100, "{fresh} bytes were tokenized again");
    // The same in one plain text, where no special token separates what is shared.
    let complete = |question: &str| tokenizer.encode(&format!("{system}{question}"), true).unwrap();
    complete("first question");
    let before = tokenizer.cache_stats().miss_bytes;
    complete("another question");
    let fresh = tokenizer.cache_stats().miss_bytes - before;
    assert!(fresh < 2 * cut::PIECE_BYTES_MIN as u64, "{fresh} bytes were tokenized again");
}

#[test]
fn every_prompt_of_a_request() {
    let tokenizer = Tokenizer::demo();
    let tokens = |api: Api, body: &str| {
        let body = request::parse(api, body.as_bytes()).unwrap();
        tokenizer.tokens_of(&body)
    };
    let hi = tokenizer.encode("hi there", true).unwrap();
    let bye = tokenizer.encode("bye", true).unwrap();
    let completions =
        |prompt: &str| tokens(Api::Completions, &format!(r#"{{"prompt": {prompt}}}"#));
    assert_eq!(completions(r#""hi there""#), Ok(vec![hi.clone()]));
    assert_eq!(completions(r#"["hi there", "bye"]"#), Ok(vec![hi, bye]));
    assert_eq!(completions("[1, 2, 3]"), Ok(vec![vec![1, 2, 3]]));
    assert_eq!(completions("[[1], [2, 3]]"), Ok(vec![vec![1], vec![2, 3]]));
    let chat = r#"{"messages": [{"role": "user", "content": "hi <|im_end|> there"}]}"#;
    let ids = tokens(Api::ChatCompletions, chat).unwrap();
    let text = "<|im_start|>user\nhi <|im_end|> there<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(tokenizer.decode(&ids[0]).unwrap(), text);
    // A special token inside the user's text is the token: engines do the same.
    assert_eq!(ids[0].iter().filter(|id| **id == 2993).count(), 2);
    let other = tokens(Api::Other, "{}").unwrap_err();
    assert_eq!(other.reason(), "no_prompt");
}

#[test]
fn what_cannot_be_tokenized_has_a_reason() {
    let demo = Tokenizer::demo();
    let user =
        |content: &str| format!(r#"{{"messages": [{{"role": "user", "content": {content}}}]}}"#);
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    let table = [
        (user(r#"[{"type": "image_url", "image_url": {"url": "x"}}]"#), "multimodal"),
        (user(r#"[{"image_url": "x"}]"#), "multimodal"),
        (user(r#"[{"type": "text", "text": "a"}, {"type": "input_audio", "x": 1}]"#), "multimodal"),
        (user("[1]"), "bad_messages"),
        (user("7"), "bad_messages"),
        (r#"{"messages": [{"content": "no role"}]}"#.to_owned(), "bad_messages"),
        (r#"{"messages": [1]}"#.to_owned(), "bad_messages"),
        (
            r#"{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}"#.to_owned(),
            "bad_messages",
        ),
        (r#"{"messages": [{"role": "user", "content": "a"}], "tools": [1, {}]}"#.to_owned(), ""),
        (
            r#"{"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ 1 }}"}"#
                .to_owned(),
            "request_template",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}],
                "chat_template_kwargs": {"tokenize": true}}"#
                .to_owned(),
            "bad_messages",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}], "continue_final_message": true}"#
                .to_owned(),
            "bad_messages",
        ),
        (
            r#"{"messages": [], "continue_final_message": true, "add_generation_prompt": false}"#
                .to_owned(),
            "bad_messages",
        ),
        (user(&deep), "bad_messages"),
    ];
    for (body, reason) in table {
        let Ok(body) = request::parse(Api::ChatCompletions, body.as_bytes()) else {
            continue; // refused before it comes here
        };
        let got = demo.tokens_of(&body);
        let got = got.as_ref().err().map_or("", TokensError::reason);
        assert!(got == reason || reason.is_empty(), "{:?}: {got} not {reason}", body.prompt);
        assert!(got.is_empty() || TokensError::REASONS.contains(&got));
    }
}

#[test]
fn rendering_is_bounded() {
    let limited = |template: &str, prompt_bytes_max: usize| {
        let options = TokenizerOptions {
            chat_template: Some(template.to_owned()),
            prompt_bytes_max,
            template_steps_max: 100_000,
            ..options()
        };
        let tokenizer = Tokenizer::demo_with(&options).unwrap();
        render(&tokenizer, r#"{"messages": [{"role": "user", "content": "x"}]}"#)
    };
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
    assert_eq!(limited(endless, 1000).unwrap_err().reason(), "too_large");
    let long = "{% for a in range(200) %}{{ 'ten bytes.' }}{% endfor %}";
    assert_eq!(limited(long, 1000).unwrap_err().reason(), "too_large");
    assert_eq!(limited(long, 2000).unwrap().len(), 2000);
    let recursive = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    assert!(limited(recursive, 1000).is_err());
    let raised = "{{ raise_exception('only two roles') }}";
    let error = limited(raised, 1000).unwrap_err();
    assert!(error.to_string().contains("only two roles"), "{error}");
    let missing = limited("{{ nothing.at.all }}", 1000).unwrap_err();
    assert_eq!(missing.reason(), "template_failed");
}

#[test]
fn sums_print_alike_with_and_without_brackets() {
    let body = r#"{"messages": [{"role": "user", "content": "x\n"}], "tools": [1]}"#;
    let table = [
        ("'a' + messages[0].content + 'b'", Some("ax\nb")),
        ("messages[0].content|trim + '\\n' + messages[0]['role']", Some("x\nuser")),
        ("'a' + ('b' + 'c')|upper + 'd'", Some("aBCd")),
        ("'a' + messages|length|string", Some("a1")),
        ("'a' + 1", None),
        ("1 + 2 + 'a'", None),
        ("'a' + messages", None),
        ("'a' + none", None),
        ("'a' + messages[0].nothing", None),
        ("'a' + messages[0].nothing.at.all", None),
    ];
    for (sum, want) in table {
        let [parts, whole] = [format!("{{{{- {sum} -}}}}"), format!("{{{{- ({sum}) -}}}}")]
            .map(|template| render(&with_template(&template), body));
        assert_eq!(parts, whole, "{sum}");
        assert_eq!(parts.ok().as_deref(), want, "{sum}");
    }
}

#[test]
fn a_trusted_request_template_is_run() {
    let options = TokenizerOptions { trust_request_template: true, ..options() };
    let tokenizer = Tokenizer::demo_with(&options).unwrap();
    let body = |template: &str| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "x"}}],
                    "chat_template": {template:?}}}"#
        )
    };
    let own = render(&tokenizer, &body("own: {{ messages[0].content }}"));
    assert_eq!(own, Ok("own: x".to_owned()));
    let default = render(&tokenizer, &body("default")).unwrap();
    assert!(default.starts_with("<|im_start|>user"), "a name stands for the model's: {default}");
    assert_eq!(render(&tokenizer, &body("{% if %}")).unwrap_err().reason(), "template_failed");
}

#[test]
fn estimates_are_four_bytes_each() {
    assert_eq!(estimate(b""), Vec::<u32>::new());
    assert_eq!(estimate(b"abcdefghi"), vec![0x6463_6261, 0x6867_6665, 0x69]);
}

#[test]
fn a_template_that_loops_over_content_wants_parts() {
    let table = [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ContentFormat::Text),
        (
            "{% for m in messages %}{% for p in m['content'] %}{% endfor %}{% endfor %}",
            ContentFormat::Parts,
        ),
        (
            "{% set ms = messages[1:] %}{% for m in ms %}\
             {% for p in m.content | reverse %}{% endfor %}{% endfor %}",
            ContentFormat::Parts,
        ),
        (
            "{% for m in messages %}{% set content = m.content %}\
             {% for item in content %}{% endfor %}{% endfor %}",
            ContentFormat::Parts,
        ),
        (
            "{% macro show(body) %}{% for item in body %}{% endfor %}{% endmacro %}\
             {% for m in messages %}{{ show(m.content) }}{% endfor %}",
            ContentFormat::Parts,
        ),
        (
            "{% macro show(content) %}{% for item in content %}{% endfor %}{% endmacro %}\
             {% for m in messages %}{{ show(m.other) }}{% endfor %}",
            ContentFormat::Text,
        ),
        (
            "{% for m in messages %}{% for c in m.tool_calls %}{% endfor %}{% endfor %}",
            ContentFormat::Text,
        ),
        (
            "{% for x in tools %}{% for p in x.content %}{% endfor %}{% endfor %}",
            ContentFormat::Text,
        ),
    ];
    for (template, want) in table {
        let tokenizer =
            with_template(&format!("{template}{{{{ messages[0].content is string }}}}"));
        let got =
            render(&tokenizer, r#"{"messages": [{"role": "user", "content": "x"}]}"#).unwrap();
        let want = if want == ContentFormat::Text { "True" } else { "False" };
        assert!(got.ends_with(want), "{template}: {got}");
    }
}
