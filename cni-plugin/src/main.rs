//! The `bpf-bridge` binary: the only place that touches the process's
//! environment, stdin, stdout and exit code.
//!
//! Nothing but the call's one JSON document is ever written to stdout: a panic
//! and a failed allocation tell their story on stderr, which a runtime quotes
//! when stdout is empty, and abort.

use std::{
    env,
    ffi::OsString,
    io::{self, IsTerminal as _, Read, Write as _},
    process::ExitCode,
};

#[cfg(feature = "faults")]
use bpf_bridge::fault;
use bpf_bridge::{cni::dispatch, commands::BpfBridge, follow, upgrade};

/// That of musl asks the kernel for memory, and gives it back, all the time.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    #[cfg(feature = "faults")]
    if let Ok(plan) = env::var(fault::VARIABLE)
        && let Err(error) = fault::arm(&plan)
    {
        let _ = writeln!(io::stderr(), "{error}");
        return ExitCode::FAILURE;
    }
    // No runtime passes arguments: they are an operator's.
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    if !arguments.is_empty() {
        return operator(&arguments);
    }
    // An operator who tries the plugin by hand has nothing to say on stdin, and
    // should not have to know that the plugin waits for its end.
    let mut stdin: Box<dyn Read> = if io::stdin().is_terminal() {
        Box::new(io::empty())
    } else {
        Box::new(io::stdin().lock())
    };
    let exit = dispatch::run(
        &mut BpfBridge::default(),
        |name| env::var_os(name),
        &mut stdin,
        // Not locked: a verb's threads write to stderr as well.
        &mut io::stdout(),
        &mut io::stderr(),
    );
    exit.into()
}

/// Serves an operator at a terminal.
fn operator(arguments: &[OsString]) -> ExitCode {
    let done = match arguments {
        [verb] if verb == "log" => {
            follow::run(&mut io::stdout()).map_err(|error| error.to_string())
        }
        [verb] if verb == "upgrade" => {
            upgrade::run(&mut io::stdout()).map_err(|error| error.to_string())
        }
        _ => Err(format!(
            "{arguments:?}: the commands are `log`, which shows what the eBPF programs of \
             networks with a `logLevel` write, and `upgrade`, which takes this binary's \
             programs into use on the ports of another one; everything else is done through \
             CNI_COMMAND"
        )),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{}: {error}", env!("CARGO_PKG_NAME"));
            ExitCode::FAILURE
        }
    }
}
