//! The `bpf-bridge` binary: the only place that touches the environment, stdin,
//! stdout and the exit code.

use std::{env, io, process::ExitCode};

use bpf_bridge::{cni::dispatch, commands::BpfBridge};

fn main() -> ExitCode {
    dispatch::run(
        &mut BpfBridge,
        |name| env::var_os(name),
        &mut io::stdin().lock(),
        &mut io::stdout().lock(),
        &mut io::stderr().lock(),
    )
    .into()
}
