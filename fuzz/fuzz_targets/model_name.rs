#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvroute_wire::fuzz_entry::model_name(bytes));
