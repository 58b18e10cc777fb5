//! The one binary. Everything it does lives in the library beside it, so that tests reach it too.

use std::process::ExitCode;

fn main() -> ExitCode {
    kvroute::cli::main()
}
