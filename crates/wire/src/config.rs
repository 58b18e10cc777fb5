//! Which configuration did the user write?
//!
//! The types are `core::config`; here they are read from YAML or JSON, strictly.

use kvroute_core::config::EndpointPickerConfig;

use crate::yaml;
pub use crate::yaml::YamlError as ConfigError;

/// Largest configuration, in bytes.
pub const CONFIG_BYTES_MAX: usize = 1 << 20;

/// Reads a configuration; `file_name` names it in errors.
///
/// # Errors
/// [`ConfigError`] with file, line, column, the lines around the fault and the valid names.
pub fn parse(text: &str, file_name: &str) -> Result<EndpointPickerConfig, ConfigError> {
    yaml::read(text, file_name, CONFIG_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const PRECISE: &str = "\
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: token-producer
- name: precise
  parameters: {speculativeIndexing: true}
  type: precise-prefix-cache-producer
- type: queue-scorer
schedulingProfiles:
- name: default
  plugins:
  - pluginRef: queue-scorer
    weight: 2
kvroute:
  body_bytes_max: 1000
";

    #[test]
    fn yaml_and_json_say_the_same() {
        let json = r#"{"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig",
            "plugins": [{"type": "token-producer"}, {"type": "precise-prefix-cache-producer",
            "name": "precise", "parameters": {"speculativeIndexing": true}},
            {"type": "queue-scorer"}], "schedulingProfiles": [{"name": "default",
            "plugins": [{"pluginRef": "queue-scorer", "weight": 2.0}]}],
            "kvroute": {"body_bytes_max": 1000}}"#;
        let config = parse(PRECISE, "c.yaml").unwrap();
        assert_eq!(config, parse(json, "c.json").unwrap());
        let names: Vec<&str> = config.plugins.iter().map(|plugin| plugin.name()).collect();
        assert_eq!(names, ["token-producer", "precise", "queue-scorer"]);
        assert_eq!(config.kvroute.limits.body_bytes_max, 1000);
        assert_eq!(config.scheduling_profiles[0].plugins[0].weight, Some(2.0));
        assert_eq!(parse("", "c.yaml").unwrap(), EndpointPickerConfig::default());
    }

    #[test]
    fn a_plugin_under_an_old_type_name_is_called_by_it() {
        let names = |text| -> Vec<String> {
            let config = parse(text, "c.yaml").unwrap();
            config.plugins.iter().map(|plugin| plugin.name().to_owned()).collect()
        };
        assert_eq!(names("plugins: [{type: kv-cache-scorer}]"), ["kv-cache-scorer"]);
        assert_eq!(names("plugins: [{type: kv-cache-scorer, name: kv}]"), ["kv"]);
        let new = "kv-cache-utilization-scorer";
        assert_eq!(names("plugins: [{type: kv-cache-utilization-scorer}]"), [new]);
    }

    #[test]
    fn an_error_shows_the_place_and_the_valid_names() {
        let text = "plugins:\n- type: queue-scorer\n  weigth: 3\n";
        let expected = "\
error in config/edge.yaml
 --> config/edge.yaml:3:3
  |
1 | plugins:
2 | - type: queue-scorer
3 |   weigth: 3
  |   ^^^^^^ unknown field `weigth`; valid: name, type, parameters";
        let error = parse(text, "config/edge.yaml").unwrap_err();
        assert_eq!(error.to_string().trim_end(), expected);
        assert_eq!((error.line, error.column), (Some(3), Some(3)));
        assert_eq!(error.file, "config/edge.yaml");
    }

    #[test]
    fn faults() {
        let long = format!("# {}", "x".repeat(CONFIG_BYTES_MAX));
        let precise = "plugins:\n- type: precise-prefix-cache-producer\n  parameters:\n    ";
        let unknown = format!("{precise}speculative: true\n");
        let deep = format!("plugins: {}{}", "[".repeat(200), "]".repeat(200));
        let table: &[(&str, Option<u32>, &str)] = &[
            ("plugins:\n- type: queue-scoer\n", Some(2), "`queue-scoer`"),
            ("plugins:\n- type: queue-scoer\n", Some(2), "nearest first: queue-scorer"),
            ("plugin: []\n", Some(1), "valid: plugins, parser, kind, apiVersion"),
            (&unknown, Some(4), "speculativeIndexing"),
            ("plugins:\n- name: x\n", Some(2), "missing a `type`"),
            ("plugins:\n- type: queue-scorer\n  type: queue-scorer\n", Some(3), "duplicate"),
            ("plugins: 3\n", Some(1), "expected a list, found 3"),
            ("apiVersion: v2\n", Some(1), "llm-d.ai/v1alpha1"),
            ("kvroute:\n  body_bytes: 3\n", Some(2), "body_bytes_max"),
            ("kvroute:\n  body_bytes_max: -3\n", Some(2), "not negative, found -3"),
            ("plugins: [\n", Some(1), "unclosed bracket"),
            ("plugins:\n\t- type: x\n", Some(2), "tabs"),
            ("{\"plugins\": [{\"type\": 3}]}", Some(1), "the name of a plugin type, found 3"),
            ("flowControl:\n  defaultRequestTTL: 60\n", Some(2), "200ms"),
            ("--- {}\n--- {}\n", Some(2), "second document"),
            (&long, None, "more than the limit"),
            (&deep, None, ""),
        ];
        for (text, line, message) in table {
            let shown: String = text.chars().take(60).collect();
            let error = parse(text, "c.yaml").expect_err(&shown);
            assert!(line.is_none() || error.line == *line, "{shown}: {error}");
            assert!(error.rendered.contains(message), "{shown}: {error}");
            assert!(error.rendered.starts_with("error in c.yaml"), "{shown}: {error}");
        }
    }

    /// Upstream's own files: what is not read has a parameter that upstream does not know either.
    #[test]
    fn files_of_llm_d() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/epp-configs");
        if !Path::new(root).exists() {
            eprintln!("skipped: {root} is not there");
            return;
        }
        let mut read = 0;
        for folder in ["samples", "well-known"] {
            for entry in std::fs::read_dir(format!("{root}/{folder}")).unwrap() {
                let path = entry.unwrap().path();
                let text = std::fs::read_to_string(&path).unwrap();
                match parse(&text, &path.display().to_string()) {
                    Ok(_) => read += 1,
                    Err(error) => {
                        assert!(error.rendered.contains("unknown field `cacheSizeInMB`"), "{error}")
                    }
                }
            }
        }
        assert!(read >= 5, "{read} files read");
    }
}
