//! `cargo xtask`: what a developer of bpf-bridge runs.
//!
//! One file per command; [`setup`] provides what the others need, so that each
//! of them works on a machine on which nothing was installed by hand.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command that talks to the person who ran it"
)]

mod bench;
mod build;
mod debian;
mod demo;
mod ebpf_toolchain;
mod fuzz;
mod kernel;
mod lint;
mod process;
mod record;
mod setup;
mod soak;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Develop bpf-bridge.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what building and testing need and this machine lacks.
    Setup,
    /// Build the plugin, one static binary.
    Build,
    /// Run all tests (needs root: pods live in namespaces).
    Test {
        /// Run what depends on the kernel on another one of Debian's, in an emulated
        /// machine: 6.1 or 6.12. With arguments, all tests that they choose.
        #[arg(long, value_name = "VERSION")]
        kernel: Option<String>,
        /// Arguments for the test binaries: a filter, `--nocapture`, …
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Count the instructions that the verifier looks at, on this kernel and on those of
    /// the virtual machines, and write the record that tests compare with.
    Record,
    /// Show the plugin at work on a node with three pods.
    Demo,
    /// Measure ADD, DEL and traffic beside the stock plugins (needs root).
    Bench(bench::Arguments),
    /// Give the parsers and the address store hostile input, looking for what breaks them.
    Fuzz(fuzz::Arguments),
    /// Keep everything going for minutes or hours, and report what leaks (needs root).
    Soak(soak::Arguments),
    /// Check format, lints and documentation.
    Lint,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Setup => setup::run_all(),
        Command::Build => build::run(),
        Command::Test { kernel, arguments } => match kernel {
            Some(version) => kernel::test(&version, &arguments),
            None => test::run_all(&arguments),
        },
        Command::Record => record::run_all(),
        Command::Demo => demo::run(),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Fuzz(arguments) => fuzz::run_all(&arguments),
        Command::Soak(arguments) => soak::run(&arguments),
        Command::Lint => lint::run_all(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
