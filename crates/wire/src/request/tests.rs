use super::*;

fn prompt_text(body: &RequestBody<'_>) -> String {
    match &body.prompt {
        Prompt::None(reason) => format!("none {}", reason.as_str()),
        Prompt::Texts(texts) => format!("texts {texts:?}"),
        Prompt::TokenIds(ids) => format!("ids {ids:?}"),
        Prompt::Chat(chat) => format!("chat {}", chat.messages.json()),
        Prompt::Opaque(opaque) => {
            let head: Vec<&str> = opaque.head.iter().map(|raw| raw.get()).collect();
            format!("opaque {} {head:?} {}", opaque.why.as_str(), opaque.conversation.get())
        }
    }
}

#[test]
fn prompts_of_every_form() {
    use Api::*;
    let many = format!(r#"{{"input":[{}"x"]}}"#, r#""x","#.repeat(PROMPTS_PER_REQUEST_MAX));
    let table: &[(Api, &str, &str)] = &[
        (Completions, r#"{"prompt":"a\nb"}"#, r#"texts ["a\nb"]"#),
        (Completions, r#"{"prompt":["a","b"]}"#, r#"texts ["a", "b"]"#),
        (Completions, r#"{"prompt":[1,2]}"#, "ids [[1, 2]]"),
        (Completions, r#"{"prompt":[[1],[2,3]]}"#, "ids [[1], [2, 3]]"),
        (Completions, r#"{"prompt":[[]]}"#, "ids [[]]"),
        (Completions, r#"{"prompt":7,"prompt":"last"}"#, r#"texts ["last"]"#),
        (Completions, r#"{"prompt":"x","messages":3,"input":{}}"#, r#"texts ["x"]"#),
        (Completions, r#"{"prompt_embeds":"AAAA"}"#, "none prompt_embeds"),
        (Completions, r#"{"prompt":"x","truncate_prompt_tokens":5}"#, "none truncated"),
        (Completions, r#"{"prompt":"x","truncate_prompt_tokens":null}"#, r#"texts ["x"]"#),
        (ChatCompletions, r#"{"messages": [ {"a":1} ] }"#, r#"chat [ {"a":1} ]"#),
        (ChatCompletions, r#"{"messages":[],"messages":[1]}"#, "chat [1]"),
        (Embeddings, r#"{"input":"a"}"#, r#"texts ["a"]"#),
        (Embeddings, r#"{"input":[[7]]}"#, "ids [[7]]"),
        (Embeddings, &many, "none too_many_prompts"),
        (Embeddings, r#"{"messages":[2]}"#, "chat [2]"),
        (VllmGenerate, r#"{"token_ids":[4,5]}"#, "ids [[4, 5]]"),
        (Responses, r#"{"input":"hi"}"#, r#"chat [{"role":"user","content":"hi"}]"#),
        (
            Responses,
            r#"{"input":"hi","instructions":"be \"brief\"","tools":[ ]}"#,
            r#"chat [{"role":"system","content":"be \"brief\""},{"role":"user","content":"hi"}]"#,
        ),
        (
            Responses,
            r#"{"input":[{"role":"user","content":[{"type":"input_text","text":"a"}]},
                {"type":"message","role":"assistant","content":[{"type":"output_text","text":"b"}]},
                {"role":"user","content":"c"}]}"#,
            concat!(
                r#"chat [{"role":"user","content":[{"type":"text","text":"a"}]},"#,
                r#"{"role":"assistant","content":"b"},{"role":"user","content":"c"}]"#
            ),
        ),
        (
            Responses,
            r#"{"input":[{"type":"function_call","name":"f"}]}"#,
            r#"opaque responses_item [] [{"type":"function_call","name":"f"}]"#,
        ),
        (
            Responses,
            r#"{"instructions":"i","input":[{"role":"user","content":[{"type":"input_image"}]}]}"#,
            r#"opaque responses_item ["\"i\""] [{"role":"user","content":[{"type":"input_image"}]}]"#,
        ),
        (
            Responses,
            r#"{"input":"x","tools":[{"type":"function"}]}"#,
            r#"opaque responses_tools ["[{\"type\":\"function\"}]"] "x""#,
        ),
        (Responses, r#"{"input":"x","previous_response_id":"r"}"#, "none stored_in_engine"),
        (Responses, r#"{"prompt":{"id":"p"}}"#, "none stored_in_engine"),
        (Other, r#"{"prompt":"x","model":"m"}"#, "none other_api"),
        (Other, "not json", "none other_api"),
        (Other, r#"{"broken"#, "none other_api"),
        (Other, "", "none other_api"),
    ];
    check_prompts(table);
}

fn check_prompts(table: &[(Api, &str, &str)]) {
    for (api, body, expected) in table {
        match parse(*api, body.as_bytes()) {
            Ok(parsed) => assert_eq!(prompt_text(&parsed), *expected, "{api:?} {body}"),
            Err(error) => panic!("{api:?} {body}: {error}"),
        }
    }
}

#[test]
fn prompts_of_sglang_and_of_apis_that_generate_nothing() {
    use Api::*;
    check_prompts(&[
        (SglangGenerate, r#"{"input_ids":[4,5]}"#, "ids [[4, 5]]"),
        (SglangGenerate, r#"{"input_ids":[[4],[5]],"text":null}"#, "ids [[4], [5]]"),
        (SglangGenerate, r#"{"text":"a"}"#, r#"texts ["a"]"#),
        (SglangGenerate, r#"{"text":["a","b"],"input_ids":null}"#, r#"texts ["a", "b"]"#),
        (SglangGenerate, r#"{"input_embeds":[[0.5]]}"#, "none prompt_embeds"),
        (SglangGenerate, r#"{"text":"a","image_data":["u"]}"#, "none unprocessed_media"),
        (SglangGenerate, r#"{"text":"a","image_data":null}"#, r#"texts ["a"]"#),
        (
            Conversations,
            r#"{"items":[{"role":"user"}]}"#,
            r#"opaque not_cached [] [{"role":"user"}]"#,
        ),
        (Conversations, "{}", "none not_cached"),
        (Render, r#"{"messages":[]}"#, "none not_cached"),
        (Images, r#"{"prompt":"a cat"}"#, "none not_cached"),
        (CountTokens, r#"{"messages":7}"#, "none other_api"),
        (CountTokens, "not json", "none other_api"),
    ]);
}

#[test]
fn bodies_that_are_refused() {
    use Api::*;
    let forms = "a string, an array of strings, an array of token ids, or an array of arrays of \
                 token ids";
    let wrong_prompt = |found: &str| format!("`prompt` must be {forms}, found {found}");
    let bad = |rest: &str| format!("the request body is not valid JSON: {rest}");
    let table: &[(Api, &str, String)] = &[
        (Completions, "", bad("EOF while parsing a value at byte 0")),
        (Completions, r#"{"prompt":"x""#, bad("EOF while parsing an object at byte 12")),
        (Completions, "{\n \"prompt\":\n ?}", bad("expected value at byte 14")),
        (Completions, r#"{"prompt":"x"} x"#, bad("trailing characters at byte 15")),
        (Completions, "[1]", "the request body must be a JSON object, found an array".into()),
        (Completions, "null", "the request body must be a JSON object, found null".into()),
        (Completions, r#"{"prompt":{}}"#, wrong_prompt("an object")),
        (Completions, r#"{"prompt":3}"#, wrong_prompt("an integer")),
        (Completions, r#"{"prompt":[]}"#, wrong_prompt("an empty array")),
        (Completions, r#"{"prompt":["a",1]}"#, wrong_prompt("an integer at position 1")),
        (Completions, r#"{"prompt":[1,"a"]}"#, wrong_prompt("a string at position 1")),
        (Completions, r#"{"prompt":[1.5]}"#, wrong_prompt("a fraction at position 0")),
        (
            Completions,
            r#"{"prompt":[-1]}"#,
            wrong_prompt("an integer that is no token id at position 0"),
        ),
        (Completions, r#"{"prompt":[[1],[null]]}"#, wrong_prompt("null at position 1")),
        (Completions, r#"{"prompt":null}"#, "`prompt` is missing; completions needs it".into()),
        (
            Completions,
            r#"{"model":5,"prompt":"x"}"#,
            "`model` must be a string, found an integer".into(),
        ),
        (
            Completions,
            r#"{"cache_salt":["x"],"prompt":"x"}"#,
            "`cache_salt` must be a string, found an array".into(),
        ),
        (ChatCompletions, "{}", "`messages` is missing; chat_completions needs it".into()),
        (
            ChatCompletions,
            r#"{"messages":"hi"}"#,
            "`messages` must be an array of messages, found a string".into(),
        ),
        (Embeddings, "{}", "`input` is missing; embeddings needs it".into()),
        (Responses, "{}", "`input` is missing; responses needs it".into()),
        (
            Responses,
            r#"{"input":7}"#,
            "`input` must be a string or an array of items, found a number".into(),
        ),
        (VllmGenerate, "{}", "`token_ids` is missing; vllm_generate needs it".into()),
        (
            VllmGenerate,
            r#"{"token_ids":"x"}"#,
            "`token_ids` must be an array of token ids, found a string".into(),
        ),
        (
            VllmGenerate,
            r#"{"token_ids":[1],"features":{"mm_hashes":{"image":["h"]}}}"#,
            "`features` must be an object with mm_hashes and mm_placeholders of equal length per \
             modality, found 1 hashes and 0 placeholders of image (at most 4096)"
                .into(),
        ),
    ];
    check_refusals(table);
}

fn check_refusals(table: &[(Api, &str, String)]) {
    for (api, body, expected) in table {
        match parse(*api, body.as_bytes()) {
            Ok(parsed) => panic!("{body} was accepted: {parsed:?}"),
            Err(error) => assert_eq!(error.to_string(), *expected, "{body}"),
        }
    }
}

#[test]
fn bodies_of_other_engines_that_are_refused() {
    use Api::*;
    check_refusals(&[
        (Messages, "{}", "`messages` is missing; messages needs it".into()),
        (
            Messages,
            r#"{"messages":{}}"#,
            "`messages` must be an array of messages, found an object".into(),
        ),
        (
            Responses,
            r#"{"input":"x","instructions":[]}"#,
            "`instructions` must be a string, found an array".into(),
        ),
        (Render, "[]", "the request body must be a JSON object, found an array".into()),
        (SglangGenerate, "{}", "`input_ids` is missing; sglang_generate needs it".into()),
        (
            SglangGenerate,
            r#"{"input_ids":["a"]}"#,
            "`input_ids` must be an array of token ids or an array of arrays of token ids, found \
             a text"
                .into(),
        ),
        (
            SglangGenerate,
            r#"{"input_ids":[]}"#,
            "`input_ids` must be an array of token ids or an array of arrays of token ids, found \
             an empty array"
                .into(),
        ),
        (
            SglangGenerate,
            r#"{"text":[1]}"#,
            "`text` must be a string or an array of strings, found an array of numbers".into(),
        ),
    ]);
}

#[test]
fn what_else_routing_reads() {
    let body = br#"{"model":"m","stream":true,"stream_options":{"include_usage":true,"x":[{}]},
        "max_tokens":3,"max_completion_tokens":4,"n":2,"cache_salt":"s","session_id":"i",
        "messages":[],"tools":[1],"documents":null,"chat_template":"{{x}}",
        "chat_template_kwargs":{"enable_thinking":false},"add_generation_prompt":false,
        "continue_final_message":true,"add_special_tokens":true,"reasoning_effort":"low",
        "unknown":{"a":[1,{"b":"c"}]}}"#;
    let body = parse(Api::ChatCompletions, body).unwrap();
    assert_eq!(body.model.as_deref(), Some("m"));
    assert!(body.stream && body.include_usage && body.add_special_tokens);
    assert_eq!((body.max_tokens, body.n), (Some(4), Some(2)));
    assert_eq!((body.cache_salt.as_deref(), body.session_id.as_deref()), (Some("s"), Some("i")));
    let Prompt::Chat(chat) = body.prompt else { panic!("no chat") };
    assert_eq!(chat.tools.as_deref().map(RawValue::get), Some("[1]"));
    assert!(chat.documents.is_none());
    assert_eq!(chat.chat_template.as_deref(), Some("{{x}}"));
    assert_eq!(chat.chat_template_kwargs.map(RawValue::get), Some(r#"{"enable_thinking":false}"#));
    assert!(!chat.add_generation_prompt && chat.continue_final_message && chat.add_special_tokens);
    assert_eq!(chat.reasoning_effort.as_deref(), Some("low"));
}

#[test]
fn defaults_are_the_engine_s() {
    let body = parse(Api::ChatCompletions, br#"{"messages":[]}"#).unwrap();
    let Prompt::Chat(chat) = body.prompt else { panic!("no chat") };
    assert!(chat.add_generation_prompt && !chat.continue_final_message && !chat.add_special_tokens);
    assert!(!body.stream && body.max_tokens.is_none() && body.model.is_none());
    let body = parse(Api::Embeddings, br#"{"messages":[]}"#).unwrap();
    let Prompt::Chat(chat) = body.prompt else { panic!("no chat") };
    assert!(!chat.add_generation_prompt);
    assert!(parse(Api::Completions, br#"{"prompt":""}"#).unwrap().add_special_tokens);
}

#[test]
fn hints_of_a_wrong_type_are_ignored() {
    let body = br#"{"prompt":"x","stream":"yes","stream_options":7,"max_tokens":-1,"n":{},
        "session_id":5}"#;
    let body = parse(Api::Completions, body).unwrap();
    assert!(!body.stream && !body.include_usage);
    assert!(body.max_tokens.is_none() && body.n.is_none() && body.session_id.is_none());
    let body = parse(Api::Completions, br#"{"prompt":"x","max_tokens":8.0}"#).unwrap();
    assert_eq!(body.max_tokens, Some(8));
}

#[test]
fn generate_brings_its_items() {
    let body = br#"{"token_ids":[1,2,3,4],"model":"m","cache_salt":"s","sampling_params":
        {"max_tokens":9},"features":{"mm_hashes":{"image":["h2","h1"],"audio":["a"]},
        "mm_placeholders":{"image":[{"offset":2,"length":1},{"offset":0,"length":2,"x":1}],
        "audio":[{"offset":3,"length":1}]},"kwargs_data":null}}"#;
    let body = parse(Api::VllmGenerate, body).unwrap();
    let items: Vec<(&str, u32, u32)> =
        body.items.iter().map(|item| (&*item.identifier, item.offset, item.length)).collect();
    assert_eq!(items, [("h1", 0, 2), ("h2", 2, 1), ("a", 3, 1)]);
    assert_eq!(body.max_tokens, Some(9));
    let body = parse(Api::VllmGenerate, br#"{"token_ids":[1],"features":null}"#).unwrap();
    assert!(body.items.is_empty());
}

#[test]
fn responses_hints() {
    let body = br#"{"input":[{"role":"assistant","content":"so","status":"in_progress"}],
        "max_output_tokens":12,"reasoning":{"effort":"high"}}"#;
    let body = parse(Api::Responses, body).unwrap();
    assert_eq!(body.max_tokens, Some(12));
    let Prompt::Chat(chat) = body.prompt else { panic!("no chat") };
    assert!(chat.continue_final_message && !chat.add_generation_prompt);
    assert_eq!(chat.reasoning_effort.as_deref(), Some("high"));
}

#[test]
fn plain_strings_are_borrowed() {
    let body = parse(Api::Completions, br#"{"model":"m","prompt":["long"]}"#).unwrap();
    assert!(matches!(body.model, Some(Cow::Borrowed("m"))));
    assert!(matches!(&body.prompt, Prompt::Texts(texts) if matches!(texts[0], Cow::Borrowed(_))));
}

#[test]
fn depth_costs_no_stack() {
    let deep = "[".repeat(500_000);
    for field in ["prompt", "messages", "tools", "model", "x", "stream_options", "features"] {
        let open = format!(r#"{{"{field}":{deep}"#);
        assert!(parse(Api::Completions, open.as_bytes()).is_err());
        let closed = format!("{open}{}}}", "]".repeat(500_000));
        let _ = parse(Api::Completions, closed.as_bytes());
    }
}

#[test]
fn logits_of_the_prompt_bypass_the_cache() {
    for (api, body, skips) in [
        (Api::Completions, r#"{"prompt":"x"}"#, false),
        (Api::Completions, r#"{"prompt":"x","prompt_logprobs":0}"#, true),
        (Api::Completions, r#"{"prompt":"x","echo":true,"logprobs":1}"#, true),
        (Api::Completions, r#"{"prompt":"x","echo":true}"#, false),
        (Api::Completions, r#"{"prompt":"x","logprobs":1,"prompt_logprobs":null}"#, false),
        (Api::VllmGenerate, r#"{"token_ids":[1],"sampling_params":{"prompt_logprobs":1}}"#, true),
        (Api::SglangGenerate, r#"{"text":"x","return_logprob":true}"#, false),
        (
            Api::SglangGenerate,
            r#"{"text":"x","return_logprob":true,"logprob_start_len":-1}"#,
            false,
        ),
        (Api::SglangGenerate, r#"{"text":"x","return_logprob":true,"logprob_start_len":0}"#, true),
        (Api::SglangGenerate, r#"{"text":"x","logprob_start_len":0}"#, false),
    ] {
        assert_eq!(parse(api, body.as_bytes()).unwrap().skips_cache, skips, "{body}");
    }
}

#[test]
fn sglang_hints() {
    let body = br#"{"input_ids":[1],"extra_key":"s","stream":true,"add_special_tokens":false,
        "sampling_params":{"max_new_tokens":7,"n":2}}"#;
    let body = parse(Api::SglangGenerate, body).unwrap();
    assert_eq!((body.max_tokens, body.n), (Some(7), Some(2)));
    assert_eq!(body.cache_salt.as_deref(), Some("s"));
    assert!(body.stream && body.add_special_tokens && body.model.is_none());
    let batch = parse(Api::SglangGenerate, br#"{"text":["a"],"sampling_params":[{}]}"#).unwrap();
    assert!(batch.max_tokens.is_none());
    let error = parse(Api::SglangGenerate, br#"{"input_ids":[1],"extra_key":["s"]}"#).unwrap_err();
    assert_eq!(error.to_string(), "`extra_key` must be a string, found an array");
}

#[test]
fn media_of_chats_and_of_what_stays_opaque() {
    let part = r#"{"type":"image_url","image_url":{"url":"http://i/1"}}"#;
    let chat = format!(r#"{{"messages":[{{"role":"user","content":[{part},{part}]}}]}}"#);
    let body = parse(Api::ChatCompletions, chat.as_bytes()).unwrap();
    assert_eq!(body.media.len(), 2);
    assert_eq!(body.media[0].hash, body.media[1].hash);
    let Prompt::Chat(chat) = &body.prompt else { panic!("{body:?}") };
    assert_eq!(&chat.messages.json()[body.media[1].place.clone()], "http://i/1");
    let responses = r#"{"input":[{"role":"user","content":[
        {"type":"input_image","image_url":"http://i/1"}]}]}"#;
    let other = parse(Api::Responses, responses.as_bytes()).unwrap();
    assert_eq!(other.media.len(), 1);
    assert_eq!(other.media[0].hash, body.media[0].hash);
    let Prompt::Opaque(opaque) = &other.prompt else { panic!("{other:?}") };
    assert_eq!(&opaque.conversation.get()[other.media[0].place.clone()], "http://i/1");
    assert!(parse(Api::Completions, br#"{"prompt":"_url\" "}"#).unwrap().media.is_empty());
}

/// What is read in one pass is what is read in two.
#[test]
fn plain_conversations_are_read_as_any_other() {
    let plain = r#"{"role":"user","content":"a \"b\"\n\u00e9 ü"}"#;
    let texts = [
        format!("[{plain}]"),
        format!("[ {plain} ,{plain}, {} ]", r#"{"content":"x","role":"s\u0079stem"}"#),
        "[]".to_owned(),
        "[ ]".to_owned(),
        "null".to_owned(),
        "{}".to_owned(),
        "7".to_owned(),
        "1e999".to_owned(),
        "\"x\"".to_owned(),
        format!("[{plain},7]"),
        format!("[7,{plain}]"),
        format!("[[{plain}]]"),
        r#"[{"role":"user","content":null}]"#.to_owned(),
        r#"[{"role":"user"}]"#.to_owned(),
        r#"[{"role":7,"content":"x"}]"#.to_owned(),
        r#"[{"role":"user","content":"x","name":"n"}]"#.to_owned(),
        r#"[{"role":"user","content":"x","content":"y"}]"#.to_owned(),
        r#"[{"role":"user","content":"x","content":[]}]"#.to_owned(),
        r#"[{"r\u006fle":"user","content":"x"}]"#.to_owned(),
        r#"[{"role":"user","content":"\ud800"}]"#.to_owned(),
        r#"[{"role":"user","content":"\ud83d\ude00"}]"#.to_owned(),
        r#"[{"role":"user","content":[{"type":"image_url","image_url":{"url":"h:i"}}]}]"#.into(),
        "[{\"role\":\"user\",\"content\":\"\u{1}\"}]".to_owned(),
        format!("[{plain}"),
        format!("[{plain},]"),
        format!("{}1{}", "[".repeat(200), "]".repeat(200)),
    ];
    let mut count = 0;
    for text in &texts {
        let bodies = [
            format!(r#"{{"messages":{text}}}"#),
            format!("{{ \"messages\" :\n{text} , \"n\" : 1 }}\n "),
            format!(r#"{{"model":"m","messages":{text},"\u006dodel":"k"}}"#),
            format!(r#"{{"m\u0065ssages":{text}}}"#),
            format!(r#"{{"messages":[{plain}],"messages":{text}}}"#),
            format!(r#"{{"messages":{text},"messages":[{plain}]}}"#),
            format!(r#"{{"messages":{text}}} x"#),
        ];
        for body in &bodies {
            let one = parse(Api::ChatCompletions, body.as_bytes());
            let two = read_once(Api::ChatCompletions, body.as_bytes())
                .map(|fields| fields.into_body(Api::ChatCompletions));
            let Ok(two) = two else {
                assert!(matches!(one, Err(BodyError::BadJson { .. })), "{body}: {one:?}");
                continue;
            };
            let shown = |read: Result<RequestBody<'_>, BodyError>| {
                read.map(|read| match read.prompt {
                    Prompt::Chat(chat) => (chat.messages.json().to_owned(), read.media),
                    other => panic!("{other:?}"),
                })
            };
            if let Ok(RequestBody { prompt: Prompt::Chat(chat), .. }) = &one
                && let Messages::Plain { turns, json } = &chat.messages
            {
                let known: Vec<serde_json::Value> = serde_json::from_slice(json).unwrap();
                let read = turns
                    .iter()
                    .map(|turn| serde_json::json!({"role": turn.role, "content": &*turn.content}));
                assert!(read.eq(known), "{body}");
                count += 1;
            }
            assert_eq!(shown(one), shown(two), "{body}");
        }
    }
    assert!(count > 20, "only {count} were plain");
}

#[test]
fn a_conversation_must_be_text() {
    let with =
        |bytes: &[u8]| [br#"{"messages":[{"role":"user","content":"#, bytes, b"}]}"].concat();
    for bytes in [&b"\"\xff\""[..], b"[\"\xff\"]", b"\"x\",\"y\":\"\xff\""] {
        let refused = parse(Api::ChatCompletions, &with(bytes)).map(|_| ());
        assert!(matches!(refused, Err(BodyError::BadJson { .. })), "{refused:?}");
    }
}

/// The one pass reads what the library reads, or nothing, whatever bytes it is given.
#[test]
fn one_pass_agrees_with_the_library_on_damaged_bodies() {
    const BODIES: [&str; 4] = [
        r#"{"model":"m\/x","messages":[{"role":"system","content":
            "long text, \"quoted\" \\ 0123456789 and so on\n\n"},
            {"content":"\u00e9\ud83d\ude00\t","role":"us\u0065r"}],
            "stream":true,"stop":["a","}"],"max_tokens":7}"#,
        " {\"messages\" : [ {\"role\":\"user\" , \"content\":\"a\"} ] , \"tools\":[{\"type\":\"f\"}],\n\"n\":1.5e3, \"x\":{\"y\":[{}]}, \"cache_salt\":\"s\\n\"}\n",
        r#"{"prompt":"one\ttext with 32 or more bytes before the end\u2028","echo":false,"model":null}"#,
        r#"{"prompt":["a","b\n"],"messages":[{"role":"user","content":"x"}],"prompt":"last"}"#,
    ];
    const BYTES: &[u8] = b"\"\\{}[],: \nntu0d8e\x01\xc3\xa9x";
    let seed = 3;
    let mut rng = kvroute_core::rng::Rng::seeded(seed);
    let mut lists = Lists::default();
    let mut memory = vec![0; 1024];
    let (mut read, mut plain) = (0, 0);
    for round in 0..20_000 {
        let at = rng.below(BODIES.len());
        let api = if at < 2 { Api::ChatCompletions } else { Api::Completions };
        let mut body = BODIES[at].as_bytes().to_vec();
        for _ in 0..rng.below(4) {
            let place = rng.below(body.len());
            match rng.below(3) {
                0 => _ = body.remove(place),
                1 => body.insert(place, BYTES[rng.below(BYTES.len())]),
                _ => body[place] = BYTES[rng.below(BYTES.len())],
            }
        }
        let shown = String::from_utf8_lossy(&body).into_owned();
        let turns = emptied(std::mem::take(&mut lists.turns));
        let Ok(one) = plain::read(api, &body, &mut memory, turns) else { continue };
        let two = read_once(api, &body);
        let two = two.unwrap_or_else(|error| panic!("seed {seed} round {round}: {error}: {shown}"));
        let (one, two) = (one.into_body(api), two.into_body(api));
        read += 1;
        let (mut one, two) = match (one, two) {
            (Ok(one), Ok(two)) => (one, two),
            (one, two) => {
                assert_eq!(one.map(drop), two.map(drop), "seed {seed} round {round}: {shown}");
                continue;
            }
        };
        if let Prompt::Chat(chat) = &mut one.prompt
            && let Messages::Plain { turns, json } = &chat.messages
        {
            let known: Vec<serde_json::Value> = serde_json::from_slice(json).unwrap();
            let value = |text: &Cow<'_, str>| serde_json::Value::from(&**text);
            let turn = |turn: &PlainTurn<'_>| {
                let (role, content) = (value(&turn.role), value(&turn.content));
                serde_json::json!({"role": role, "content": content})
            };
            assert!(turns.iter().map(turn).eq(known), "seed {seed} round {round}: {shown}");
            chat.messages = Messages::Raw(std::str::from_utf8(json).unwrap());
            plain += 1;
        }
        assert_eq!(format!("{one:?}"), format!("{two:?}"), "seed {seed} round {round}: {shown}");
        lists.take_back(one);
    }
    assert!(read > 3000 && plain > 1000, "{read} read, {plain} of them plain");
}
