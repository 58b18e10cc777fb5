//! The one binary. Everything it does lives in the library beside it, so that tests reach it too.

use std::process::ExitCode;

/// What one thread takes another gives back, a connection's task goes where there is room: with
/// glibc's allocator threads then wait for each other.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    kvroute::cli::main()
}
