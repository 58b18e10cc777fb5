//! Whatever was seen before, the chains are those of the ids of the whole text.

use kvroute_core::blocks::{MultimodalSpan, TokenSpace};

use super::*;

const SPECS: [ChainSpec; 4] = [
    ChainSpec { block_size: 16, space: TokenSpace::Exact, partial_tail: false },
    ChainSpec { block_size: 16, space: TokenSpace::Exact, partial_tail: true },
    ChainSpec { block_size: 3, space: TokenSpace::Exact, partial_tail: true },
    ChainSpec { block_size: 0, space: TokenSpace::Exact, partial_tail: true },
];

/// A request with texts as prompts.
fn body_of(texts: &[&str], salt: Option<&str>, special: bool) -> String {
    let salt = salt.map_or("null".to_owned(), |salt| format!("{salt:?}"));
    let texts = serde_json::to_string(texts).unwrap();
    format!(r#"{{"prompt":{texts},"cache_salt":{salt},"add_special_tokens":{special}}}"#)
}

/// The chains without any cache.
fn expected(
    tokenizer: &Tokenizer,
    body: &RequestBody<'_>,
    wanted: Wanted<'_>,
) -> Vec<PromptChains> {
    let Prompt::Texts(texts) = &body.prompt else { panic!("no texts: {body:?}") };
    let model = &tokenizer.inner.model;
    let whole = |text: &str| {
        let ids = model.encode_whole(text).unwrap();
        if body.add_special_tokens { model.around(&ids) } else { ids }
    };
    let ids: Vec<Vec<u32>> = texts.iter().map(|text| whole(text)).collect();
    let mut prompts = Vec::new();
    chains_of_ids(ids.iter().map(Vec::as_slice), body, wanted, &mut prompts);
    prompts
}

/// Prompts that share beginnings of each other, cut anywhere.
fn related_text(rng: &mut Rng, shared: &mut Vec<String>) -> String {
    let parts = [0, 3, 40, 400, 2000][rng.below(5)];
    let base = &shared[rng.below(shared.len())];
    let mut cut = if rng.below(3) == 0 { rng.below(base.len() + 1) } else { base.len() };
    while !base.is_char_boundary(cut) {
        cut -= 1;
    }
    let mut text = base[..cut].to_owned();
    if rng.below(4) > 0 {
        text.push_str(&rough_text(rng, parts));
    }
    let place = rng.below(12);
    match shared.get_mut(place) {
        Some(old) => *old = text.clone(),
        None => shared.push(text.clone()),
    }
    text
}

fn check_chains(tokenizer: &Tokenizer, seed: u64, rounds: usize) {
    let mut rng = Rng::seeded(seed);
    let mut shared = vec![String::new()];
    let mut prompts = Vec::new();
    for round in 0..rounds {
        let texts: Vec<String> =
            (0..1 + rng.below(2)).map(|_| related_text(&mut rng, &mut shared)).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let salt = [None, None, Some("tenant-a"), Some("tenant-b"), Some("")][rng.below(5)];
        let root = [Root::Base, Root::Base, Root::Adapter("lora-a"), Root::Adapter("b")];
        let from = rng.below(SPECS.len());
        let wanted = Wanted { specs: &SPECS[from..], root: root[rng.below(4)] };
        let json = body_of(&texts, salt, rng.below(2) == 0);
        let body = request::parse(Api::Completions, json.as_bytes()).unwrap();
        let want = expected(tokenizer, &body, wanted);
        let counts = tokenizer.chains_of(&body, wanted, &mut prompts).unwrap();
        assert!(prompts == want, "seed {seed} round {round}: {json}");
        let tokens = want.iter().map(|prompt| prompt.chains[0].tokens as usize).sum::<usize>();
        assert_eq!(counts.tokens, tokens);
        let chars = texts.iter().map(|text| text.chars().count() as u64).sum();
        assert_eq!(counts.chars, Some(chars));
        tokenizer.inner.model.check_cache();
    }
}

#[test]
fn chains_are_those_of_the_whole_whatever_was_seen() {
    for (seed, cache_bytes_max) in [(1, 0), (2, 100 << 10), (3, 600 << 10), (4, 64 << 20)] {
        let tokenizer =
            Tokenizer::demo_with(&TokenizerOptions { cache_bytes_max, ..options() }).unwrap();
        check_chains(&tokenizer, seed, 40);
        let stats = tokenizer.cache_stats();
        assert_eq!(stats.hits > 10, cache_bytes_max > 0, "{stats:?}");
    }
}

#[test]
fn threads_that_share_a_tokenizer_do_not_disturb_each_other() {
    let options = TokenizerOptions { cache_bytes_max: 300 << 10, ..options() };
    let tokenizer = Tokenizer::demo_with(&options).unwrap();
    std::thread::scope(|scope| {
        for seed in [11, 11, 12] {
            let tokenizer = &tokenizer;
            scope.spawn(move || check_chains(tokenizer, seed, 20));
        }
    });
    tokenizer.inner.model.check_cache();
}

#[test]
fn items_are_part_of_the_keys_of_a_text_too() {
    let tokenizer = Tokenizer::demo();
    let text = "a picture of a harbor ".repeat(20);
    let json = body_of(&[&text], None, true);
    let mut body = request::parse(Api::Completions, json.as_bytes()).unwrap();
    let wanted = Wanted { specs: &SPECS[..1], root: Root::Base };
    let keys = |body: &RequestBody<'_>| {
        let mut prompts = Vec::new();
        tokenizer.chains_of(body, wanted, &mut prompts).unwrap();
        prompts.remove(0).chains.remove(0).keys
    };
    let plain = keys(&body);
    body.items = vec![MultimodalSpan { identifier: "x".into(), offset: 20, length: 4 }];
    let with_item = keys(&body);
    assert_eq!((plain[0], plain.len()), (with_item[0], with_item.len()));
    assert_ne!(plain[1], with_item[1]);
    body.items.clear();
    assert_eq!(keys(&body), plain);
}

#[test]
fn what_was_seen_is_not_tokenized_again() {
    let tokenizer = Tokenizer::demo();
    let wanted = Wanted { specs: &SPECS[..2], root: Root::Base };
    let mut prompts = Vec::new();
    let mut fresh = |json: &str| {
        let body = request::parse(Api::ChatCompletions, json.as_bytes()).unwrap();
        let before = tokenizer.cache_stats().miss_bytes;
        tokenizer.chains_of(&body, wanted, &mut prompts).unwrap();
        tokenizer.cache_stats().miss_bytes - before
    };
    let mut turns = String::new();
    for turn in 0..6 {
        let text = format!("message {turn} {}", "and more of it ".repeat(100 + turn));
        turns.push_str(&format!(r#"{{"role":"user","content":"{text}"}}"#));
        let json = format!(r#"{{"messages":[{turns}]}}"#);
        let bytes = fresh(&json);
        assert!(bytes < text.len() as u64 + 200, "{bytes} bytes of turn {turn}");
        let again = fresh(&json);
        assert!(again < 64, "{again} bytes of the same prompt");
        turns.push(',');
    }
}
