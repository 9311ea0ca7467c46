//! The `bpf-bridge` binary: the only place that touches the process's
//! environment, stdin, stdout and exit code.
//!
//! Nothing but the call's one JSON document is ever written to stdout: a panic
//! and a failed allocation tell their story on stderr, which a runtime quotes
//! when stdout is empty, and abort.

use std::{
    env,
    io::{self, IsTerminal as _, Read},
    process::ExitCode,
};

use bpf_bridge::{cni::dispatch, commands::BpfBridge};

fn main() -> ExitCode {
    // An operator who tries the plugin by hand has nothing to say on stdin, and
    // should not have to know that the plugin waits for its end.
    let mut stdin: Box<dyn Read> = if io::stdin().is_terminal() {
        Box::new(io::empty())
    } else {
        Box::new(io::stdin().lock())
    };
    let exit = dispatch::run(
        &mut BpfBridge,
        |name| env::var_os(name),
        &mut stdin,
        // Not locked: a verb's threads write to stderr as well.
        &mut io::stdout(),
        &mut io::stderr(),
    );
    exit.into()
}
