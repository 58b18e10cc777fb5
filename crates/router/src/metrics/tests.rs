mod docs;
pub(super) mod exposition;

use super::*;

#[test]
fn model_labels_are_bounded() {
    let metrics = Metrics::new(2);
    for model in ["a", "b", "c", "d"] {
        metrics.set_model_mode(model, "precise");
    }
    metrics.set_model_mode("a", "load-only");
    let page = metrics.render();
    for line in [
        "kvroute_model_mode{model=\"a\",mode=\"load-only\"} 1",
        "kvroute_model_mode{model=\"b\",mode=\"precise\"} 1",
        "kvroute_model_mode{model=\"other\",mode=\"precise\"} 1",
    ] {
        assert!(page.contains(line), "{line} in {page}");
    }
    assert_eq!(page.matches("kvroute_model_mode{").count(), 3);
}

#[test]
fn labels_of_rewrites_are_bounded() {
    let metrics = Metrics::new(2);
    let long = "x".repeat(MODEL_LABEL_BYTES_MAX + 1);
    for from in ["a", "b", "c", "a", &long] {
        metrics.count_rewrite("r", from, "t");
    }
    let page = metrics.render();
    for line in [
        "kvroute_model_rewrites_total{rule=\"r\",from=\"a\",to=\"t\"} 2",
        "kvroute_model_rewrites_total{rule=\"r\",from=\"b\",to=\"t\"} 1",
        "kvroute_model_rewrites_total{rule=\"r\",from=\"other\",to=\"other\"} 2",
    ] {
        assert!(page.contains(line), "{line} in {page}");
    }
}

#[test]
fn an_endpoint_leaves_no_labels() {
    let metrics = Metrics::new(2);
    metrics.endpoint("10.0.0.1:8000").up.set(1);
    assert!(metrics.render().contains("10.0.0.1:8000"));
    metrics.forget_endpoint("10.0.0.1:8000");
    assert!(!metrics.render().contains("10.0.0.1:8000"));
}
