//! Pages of engines, recorded and made up.

use kvroute_core::Rng;
use kvroute_core::collect::{CollectPlan, CoreMetricsExtractor, ExtractorSpec, MetricsDataSource};
use kvroute_core::collect::{SourceEntry, SourceSpec};
use kvroute_core::fleet::{EngineMetrics, LoraMetrics, Name};

use super::*;

fn recorded(name: &str) -> Scrape {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/wire/metrics/");
    parse(&std::fs::read(format!("{path}{name}")).unwrap()).unwrap()
}

fn metrics(page: &str) -> EngineMetrics {
    parse(page.as_bytes()).unwrap().metrics
}

#[test]
fn recorded_pages_of_vllm() {
    let scrape = recorded("vllm-lora.prom");
    assert_eq!(scrape.engine.as_str(), "vllm");
    let expected = EngineMetrics {
        block_size: Some(32),
        blocks: Some(64),
        // The series of lora-a and of no adapter are older.
        lora: Some(LoraMetrics { running: vec![], waiting: vec![], max: 2 }),
        prefix_queries_tokens: Some(13_049),
        prefix_hits_tokens: Some(7_808),
        ..EngineMetrics::default()
    };
    assert_eq!(scrape.metrics, expected);
    let chat = recorded("vllm-chat.prom").metrics;
    assert_eq!((chat.blocks, chat.block_size, chat.lora), (Some(64), Some(32), None));
    let hybrid = recorded("vllm-hybrid.prom").metrics;
    assert_eq!((hybrid.blocks, hybrid.block_size), (Some(160), Some(32)));
}

#[test]
fn the_newest_adapters_count() {
    let series = |running: &str, waiting: &str, value: &str| {
        format!(
            "vllm:lora_requests_info{{max_lora=\"4\",running_lora_adapters=\"{running}\",\
             waiting_lora_adapters=\"{waiting}\"}} {value}\n"
        )
    };
    let page = [
        "vllm:num_requests_running 1\n".to_owned(),
        series("old", "", "1.7953263526e+09"),
        series("a, b,\\\"c\\\\,", "d", "1.7953263530e+09"),
        series("older", "", "1.7953263520e+09"),
    ]
    .concat();
    let lora = metrics(&page).lora.unwrap();
    assert_eq!((lora.max, lora.waiting), (4, vec!["d".to_owned()]));
    assert_eq!(lora.running, ["a", "b", "\"c\\"]);
}

#[test]
fn ranks_add_up_and_usage_is_their_mean() {
    let page = "# HELP vllm:num_requests_waiting x\n\
        vllm:num_requests_waiting{engine=\"0\",model_name=\"m}\\\"{\"} 3.0\r\n\
        vllm:num_requests_waiting{engine=\"1\",model_name=\"m\"} 4 1700000000000\n\
        vllm:num_requests_waiting_by_reason{engine=\"0\",reason=\"capacity\"} 99\n\
        vllm:num_requests_running{engine=\"0\"} 5\n\
        vllm:num_requests_running{engine=\"1\"} NaN\n\
        vllm:kv_cache_usage_perc{engine=\"0\"} 0.5\n\
        vllm:kv_cache_usage_perc{engine=\"1\"} 0.75\n\
        vllm:kv_cache_usage_perc{engine=\"2\"} +Inf\n\
        vllm:cache_config_info{engine=\"0\",block_size=\"16\",num_gpu_blocks=\"10\"} 1.0\n\
        vllm:cache_config_info{engine=\"1\",block_size=\"16\",num_gpu_blocks=\"None\"} 1.0\n\
        vllm:cache_config_info{engine=\"2\",block_size=\"16\",num_gpu_blocks=\"10\"} 1.0";
    let read = metrics(page);
    assert_eq!((read.waiting, read.running), (7, 5));
    assert!((read.kv_usage - 0.625).abs() < 1e-12);
    assert_eq!((read.block_size, read.blocks), (Some(16), Some(20)));
}

#[test]
fn the_cache_configuration_of_vllm() {
    let page = "# HELP vllm:cache_config_info x\nvllm:cache_config_info{block_size=\"32\",\
        enable_prefix_caching=\"False\",prefix_caching_hash_algo=\"sha256_cbor\"} 1.0\n";
    let expected =
        CacheConfig { prefix_caching: Some(false), hash_algorithm: Some("sha256_cbor".to_owned()) };
    assert_eq!(cache_config(page.as_bytes()), expected);
    for page in ["", "vllm:cache_config_info 1\n", "vllm:cache_config_info{a=\"b\"} 1\n"] {
        assert_eq!(cache_config(page.as_bytes()), CacheConfig::default(), "{page}");
    }
}

#[test]
fn other_engines() {
    let sglang = "sglang:num_queue_reqs{model_name=\"m\",tp_rank=\"0\"} 2\n\
        sglang:num_running_reqs{model_name=\"m\"} 3\n\
        sglang:token_usage{model_name=\"m\"} 0.25\n\
        sglang:cache_config_info{page_size=\"64\",num_pages=\"100\"} 1\n\
        sglang:page_size{model_name=\"m\"} 64.0\nsglang:num_pages{model_name=\"m\"} 100.0";
    let trtllm = "trtllm_num_requests_waiting 2\ntrtllm_num_requests_running 3\n\
        trtllm_kv_cache_utilization 0.25\ntrtllm_kv_cache_tokens_per_block 64\n\
        trtllm_kv_cache_max_blocks 100";
    let triton = "nv_inference_pending_request_count{model=\"m\"} 77\n\
        nv_trt_llm_request_metrics{request_type=\"waiting\",model=\"m\"} 2\n\
        nv_trt_llm_request_metrics{model=\"m\",request_type=\"scheduled\"} 3\n\
        nv_trt_llm_request_metrics{request_type=\"context\"} 9\n\
        nv_inference_exec_count{model=\"m\"} 78\n\
        nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"fraction\"} 0.25\n\
        nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"tokens_per\"} 64\n\
        nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"max\"} 100";
    let table = [(sglang, "sglang"), (trtllm, "trtllm-serve"), (triton, "triton-tensorrt-llm")];
    for (page, engine) in table {
        let scrape = parse(page.as_bytes()).unwrap();
        let expected = EngineMetrics {
            waiting: 2,
            running: 3,
            kv_usage: 0.25,
            block_size: Some(64),
            blocks: Some(100),
            ..EngineMetrics::default()
        };
        assert_eq!(scrape, Scrape { engine: Name::from(engine), metrics: expected });
    }
    let plain = "nv_inference_pending_request_count 7\nnv_inference_exec_count 8\n";
    let scrape = parse(plain.as_bytes()).unwrap();
    assert_eq!((scrape.engine.as_str(), scrape.metrics.waiting), ("triton", 7));
    assert_eq!(scrape.metrics.running, 8);
}

#[test]
fn pages_that_say_nothing_are_errors() {
    let no_load = MetricsError::NoLoad(Name::from("vllm"));
    let table = [
        ("", MetricsError::NoEngine),
        ("<html>no metrics</html>", MetricsError::NoEngine),
        ("# HELP vllm:num_requests_waiting x\nprocess_open_fds 3\n", MetricsError::NoEngine),
        ("vllm:num_requests_waiting{engine=\"0\" 3\n", MetricsError::NoEngine),
        ("vllm:num_requests_waiting three\n", MetricsError::NoEngine),
        ("vllm:kv_cache_usage_perc 0.5\n", no_load.clone()),
        ("vllm:num_requests_waiting -1\n", no_load.clone()),
    ];
    for (page, error) in table {
        assert_eq!(parse(page.as_bytes()), Err(error), "{page}");
    }
}

/// The reader of a `core-metrics-extractor` with these parameters.
fn reader(parameters: &str) -> EngineReader {
    let extractor: CoreMetricsExtractor = serde_json::from_str(parameters).unwrap();
    let name = Name::from("core");
    let source = SourceEntry {
        name: name.clone(),
        spec: SourceSpec::Metrics(MetricsDataSource::default()),
        extractors: vec![(name, ExtractorSpec::CoreMetrics(extractor))],
    };
    let plan = CollectPlan::build(&[source], false, None).unwrap();
    match &plan.pages[0].readings[0] {
        Reading::Engine(reading) => EngineReader::new(reading),
        other => panic!("{other:?}"),
    }
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

/// What a reader makes of a page of an endpoint with an engine label.
fn read_as(
    reader: &EngineReader,
    engine: &str,
    page: &str,
) -> (Result<Scrape, MetricsError>, Vec<(String, f64)>) {
    let mut values = Vec::new();
    let choice = reader.engine_of(&labels(&[("llm-d.ai/engine-type", engine)]));
    (reader.read(choice, page.as_bytes(), &mut values), values)
}

/// Pages with the names of every engine that llm-d knows, as the table of its defaults has them.
#[test]
fn every_engine_by_its_label() {
    let vllm = "vllm:num_requests_waiting 2\nvllm:num_requests_running 3\n\
        vllm:kv_cache_usage_perc 0.25\n\
        vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"a\",\
        waiting_lora_adapters=\"\"} 1\n\
        vllm:cache_config_info{block_size=\"64\",num_gpu_blocks=\"100\"} 1\n";
    let sglang = "sglang:num_queue_reqs 2\nsglang:num_running_reqs 3\nsglang:token_usage 0.25\n\
        sglang:cache_config_info{page_size=\"64\",num_pages=\"100\"} 1\n";
    let trtllm = "trtllm_num_requests_waiting 2\ntrtllm_num_requests_running 3\n\
        trtllm_kv_cache_utilization 0.25\ntrtllm_kv_cache_tokens_per_block 64\n\
        trtllm_kv_cache_max_blocks 100\n";
    let tensorrt = "nv_trt_llm_request_metrics{request_type=\"waiting\"} 2\n\
        nv_trt_llm_request_metrics{request_type=\"scheduled\"} 3\n\
        nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"fraction\"} 0.25\n\
        nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"tokens_per\"} 64\n\
        nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"max\"} 100\n";
    let triton = "nv_inference_pending_request_count 2\nnv_inference_exec_count 3\n";
    let full = EngineMetrics {
        waiting: 2,
        running: 3,
        kv_usage: 0.25,
        block_size: Some(64),
        blocks: Some(100),
        ..EngineMetrics::default()
    };
    let lora = LoraMetrics { running: vec!["a".into()], waiting: vec![], max: 4 };
    let bare = EngineMetrics { waiting: 2, running: 3, ..EngineMetrics::default() };
    let table = [
        ("vllm", vllm, EngineMetrics { lora: Some(lora), ..full.clone() }),
        ("sglang", sglang, full.clone()),
        ("trtllm-serve", trtllm, full.clone()),
        ("triton-tensorrt-llm", tensorrt, full),
        ("triton", triton, bare),
    ];
    let all: String = table.iter().map(|(_, page, _)| *page).collect();
    let reversed: String = table.iter().rev().map(|(_, page, _)| *page).collect();
    let reader = reader("{}");
    for (engine, page, metrics) in table {
        let expected = Ok(Scrape { engine: Name::from(engine), metrics });
        // The label decides, whatever else is on the page.
        for page in [page, &all, &reversed] {
            assert_eq!(read_as(&reader, engine, page).0, expected, "{engine}");
        }
        // Without a label that is known, the names do.
        for label in ["", "unheard-of"] {
            assert_eq!(read_as(&reader, label, page).0, expected, "{engine}");
        }
        let other = if engine == "vllm" { "sglang" } else { "vllm" };
        let refused = Err(MetricsError::OtherEngine(Name::from(other)));
        assert_eq!(read_as(&reader, other, page).0, refused, "{engine}");
    }
    for page in [all, reversed] {
        let (scrape, _) = read_as(&reader, "", &page);
        assert_eq!(scrape.unwrap().engine.as_str(), "vllm");
    }
}

const CUSTOM: &str = r#"{"defaultEngine": "mine", "engineConfigs": [
    {"name": "mine", "queuedRequestsSpec": "q{state=waiting}", "runningRequestsSpec": "r",
     "kvUsageSpec": "kv", "cacheInfoSpec": "info", "cacheBlockSizeLabelName": "bs",
     "cacheNumBlocksLabelName": "nb", "loraSpec": "lora{engine=\"0\"}", "customMetrics": [
        {"attributeKey": "depth", "metricSpec": "depth{tier=gold}"},
        {"attributeKey": "both", "metricSpec": "q{state=waiting}"},
        {"attributeKey": "odd", "metricSpec": "odd{path=\"a\\\\b\\\"}\"}"}]}]}"#;

#[test]
fn engines_and_numbers_of_the_users_choice() {
    let reader = reader(CUSTOM);
    let page = "q{state=\"waiting\",rank=\"0\"} 1\nq{rank=\"1\",state=\"waiting\"} 2\n\
        q{state=\"swapped\"} 40\nq 50\nr 3\nkv 0.5\ninfo{bs=\"8\",nb=\"9\",block_size=\"1\"} 1\n\
        lora{engine=\"1\",max_lora=\"9\"} 7\nlora{engine=\"0\",max_lora=\"2\"} 5\n\
        depth{tier=\"silver\"} 8\ndepth{tier=\"gold\"} -4.5\ndepth{tier=\"gold\"} 5\n\
        odd{path=\"a\\\\b\\\"}\"} 6\nvllm:num_requests_waiting 99\n";
    let (scrape, values) = read_as(&reader, "", page);
    let scrape = scrape.unwrap();
    let expected = EngineMetrics {
        waiting: 3,
        running: 3,
        kv_usage: 0.5,
        block_size: Some(8),
        blocks: Some(9),
        lora: Some(LoraMetrics { max: 2, ..LoraMetrics::default() }),
        ..EngineMetrics::default()
    };
    assert_eq!(scrape, Scrape { engine: Name::from("mine"), metrics: expected });
    let values: Vec<_> = values.iter().map(|(key, value)| (key.as_str(), *value)).collect();
    assert_eq!(values, [("depth", -4.5), ("both", 1.0), ("odd", 6.0)]);
    // The page of another engine by its label.
    let (scrape, values) = read_as(&reader, "vllm", page);
    assert_eq!((scrape.unwrap().metrics.waiting, values), (99, vec![]));
}

#[test]
fn the_newest_sample_counts_and_missing_numbers_stay_away() {
    let reader = reader(CUSTOM);
    let page = "depth{tier=\"gold\"} 1 1000\ndepth{tier=\"gold\"} 2 3000\n\
        depth{tier=\"gold\"} 3 2000\ndepth{tier=\"gold\"} 4\nq{state=\"waiting\"} NaN\n";
    let (scrape, values) = read_as(&reader, "", page);
    assert_eq!(scrape, Err(MetricsError::NoLoad(Name::from("mine"))));
    assert_eq!(values, [("depth".to_owned(), 2.0)]);
    let (scrape, values) = read_as(&reader, "", "other 1\n");
    assert_eq!((scrape, values), (Err(MetricsError::OtherEngine(Name::from("mine"))), vec![]));
}

#[test]
fn the_busiest_gpu_of_the_own_pod() {
    let gpu = |pod: &str, value: &str| {
        format!("DCGM_FI_DEV_GPU_UTIL{{gpu=\"0\",{pod}modelName=\"H100\"}} {value}\n")
    };
    let (mine, other) = ("pod=\"mine\",", "pod=\"other\",");
    let table = [
        (gpu("", "37"), Some(0.37)),
        (gpu(mine, "20") + &gpu(mine, "80") + &gpu(mine, "60"), Some(0.8)),
        (gpu(mine, "20") + &gpu(other, "80"), Some(0.2)),
        (gpu(other, "20") + &gpu("", "10"), Some(0.1)),
        (gpu(other, "20"), None),
        (gpu(mine, "0"), Some(0.0)),
        // What DCGM writes where it measured nothing.
        (gpu(mine, "2147483632") + &gpu(mine, "NaN") + &gpu(mine, "-1"), None),
        ("DCGM_FI_DEV_GPU_UTILITY 3\nDCGM_FI_DEV_GPU_TEMP 50\n".to_owned(), None),
        (String::new(), None),
    ];
    for (page, expected) in table {
        assert_eq!(gpu_utilization(page.as_bytes(), "mine"), expected, "{page}");
    }
    let page = gpu(mine, "20") + &gpu(other, "80");
    assert_eq!(gpu_utilization(page.as_bytes(), ""), Some(0.8));
}

#[test]
fn averages_of_a_cluster() {
    let spec = |text| MetricSpec::parse(text).unwrap();
    let kv = spec("llm_d_epp_average_kv_cache_utilization");
    let queue = spec("llm_d_epp_average_queue_size{name=pool}");
    let reader = ScalarReader::new(&[("kv".to_owned(), kv), ("queue".to_owned(), queue)]);
    let page = "llm_d_epp_average_kv_cache_utilization{name=\"pool\"} 0.75\n\
        llm_d_epp_average_queue_size{name=\"x\"} 9\n\
        llm_d_epp_average_queue_size{name=\"pool\"} 3\n";
    let mut values = Vec::new();
    assert_eq!(reader.read(page.as_bytes(), &mut values), None);
    assert_eq!(values, [("kv".to_owned(), 0.75), ("queue".to_owned(), 3.0)]);
    values.clear();
    let half = "llm_d_epp_average_kv_cache_utilization{name=\"pool\"} 0.5\n";
    let missing = reader.read(half.as_bytes(), &mut values);
    assert_eq!(missing, Some("llm_d_epp_average_queue_size"));
    assert_eq!(values, [("kv".to_owned(), 0.5)]);
}

/// Random lines of a few names and labels: the sums are those of a reader that looks at every
/// family for every line.
#[test]
fn one_pass_finds_what_a_search_finds() {
    let names = ["a", "ab", "b", "a_much_longer_name", "ab:c"];
    let values = ["x", "y", "q\"q", "b\\"];
    for seed in 0..300 {
        let mut rng = Rng::seeded(seed);
        let specs: Vec<MetricSpec> = (0..1 + rng.below(5))
            .map(|_| MetricSpec {
                name: names[rng.below(names.len())].to_owned(),
                labels: (0..rng.below(3))
                    .map(|n| (format!("l{n}"), values[rng.below(values.len())].to_owned()))
                    .collect(),
            })
            .collect();
        let families = Families::new(specs.iter().zip(0..));
        let mut expected = vec![0.0; specs.len()];
        let mut page = String::new();
        for _ in 0..40 {
            let name = names[rng.below(names.len())];
            let value = rng.below(100) as f64;
            let labels: Vec<(String, &str)> = (0..rng.below(4))
                .map(|n| (format!("l{n}"), values[rng.below(values.len())]))
                .collect();
            for (spec, sum) in specs.iter().zip(&mut expected) {
                let has = |(k, v): &(String, String)| labels.iter().any(|(a, b)| a == k && b == v);
                if spec.name == name && spec.labels.iter().all(has) {
                    *sum += value;
                }
            }
            let shown = |(k, v): &(String, &str)| {
                format!("{k}=\"{}\"", v.replace('\\', "\\\\").replace('"', "\\\""))
            };
            let shown: Vec<String> = labels.iter().map(shown).collect();
            page += &match shown.is_empty() && rng.below(2) == 0 {
                true => format!("{name} {value}\n"),
                false => format!("{name}{{{}}} {value}\n", shown.join(",")),
            };
        }
        let mut found = vec![0.0; specs.len()];
        families.scan(page.as_bytes(), |at: &usize, _, sample| found[*at] += sample.value);
        assert_eq!(found, expected, "seed {seed}\n{specs:?}\n{page}");
    }
}
