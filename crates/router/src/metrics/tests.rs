mod docs;
pub(super) mod exposition;

use super::*;

#[test]
fn model_labels_are_bounded() {
    let metrics = Metrics::new(2);
    for model in ["a", "b", "c", "d"] {
        metrics.set_model_mode(model, "precise", |_| false);
    }
    metrics.set_model_mode("a", "load-only", |_| false);
    let page = metrics.render();
    for line in [
        "kvroute_model_mode{model=\"a\",mode=\"load-only\"} 1",
        "kvroute_model_mode{model=\"b\",mode=\"precise\"} 1",
        "kvroute_model_mode{model=\"other\",mode=\"precise\"} 1",
    ] {
        assert!(page.contains(line), "{line} in {page}");
    }
    assert_eq!(page.matches("kvroute_model_mode{").count(), 3);
    metrics.set_model_mode("late but known", "precise", |model| model == "late but known");
    assert!(metrics.render().contains("{model=\"late but known\",mode=\"precise\"} 1"));
}

#[test]
fn long_names_are_no_labels() {
    let metrics = Metrics::new(8);
    let long = "x".repeat(LABEL_BYTES_MAX + 1);
    metrics.set_model_mode(&long, "precise", |_| true);
    metrics.count_rewrite("r", &long, "t", |_| true);
    metrics.count_rewrite("r", "f", &long, |_| true);
    let page = metrics.render();
    for line in [
        "kvroute_model_mode{model=\"other\",mode=\"precise\"} 1",
        "kvroute_model_rewrites_total{rule=\"r\",from=\"other\",to=\"t\"} 1",
        "kvroute_model_rewrites_total{rule=\"r\",from=\"f\",to=\"other\"} 1",
    ] {
        assert!(page.contains(line), "{line} in {page}");
    }
    assert!(!page.contains("xxx"), "{page}");
    assert_eq!(cut(&long).len(), LABEL_BYTES_MAX);
    assert_eq!(cut(&"\u{20ac}".repeat(100)).len(), LABEL_BYTES_MAX - 1, "between characters");
}

#[test]
fn labels_of_rewrites_are_bounded() {
    let metrics = Metrics::new(2);
    for from in ["a", "b", "c", "a", "d"] {
        metrics.count_rewrite("r", from, "t", |_| false);
    }
    for from in ["known", "e"] {
        metrics.count_rewrite("r", from, "t", |model| model == "known" || model == "t");
    }
    let page = metrics.render();
    for line in [
        "kvroute_model_rewrites_total{rule=\"r\",from=\"a\",to=\"t\"} 2",
        "kvroute_model_rewrites_total{rule=\"r\",from=\"b\",to=\"t\"} 1",
        "kvroute_model_rewrites_total{rule=\"r\",from=\"other\",to=\"other\"} 2",
        "kvroute_model_rewrites_total{rule=\"r\",from=\"known\",to=\"t\"} 1",
        "kvroute_model_rewrites_total{rule=\"r\",from=\"other\",to=\"t\"} 1",
    ] {
        assert!(page.contains(line), "{line} in {page}");
    }
}

#[test]
fn an_endpoint_leaves_no_labels() {
    let metrics = docs::filled();
    let endpoint = "10.0.0.1:8000";
    let series = |page: &str, endpoint: &str| -> Vec<String> {
        let of = |line: &&str| line.contains(&format!("endpoint=\"{endpoint}\""));
        page.lines().filter(of).map(str::to_owned).collect()
    };
    assert!(series(&metrics.render(), endpoint).len() > 20);
    metrics.forget_endpoint(endpoint);
    let page = metrics.render();
    let left = series(&page, endpoint);
    assert!(left.iter().all(|line| line.starts_with("kvroute_source_")), "{left:#?}");
    // What is in flight ends later.
    metrics.count_request(endpoint, StatusLabel(200), "precise");
    metrics.count_upstream_failure(endpoint, "r");
    let page = metrics.render();
    assert_eq!(series(&page, endpoint), left);
    assert_eq!(series(&page, OTHER).len(), 2, "{page}");
}
