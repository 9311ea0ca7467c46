//! `cargo xtask test --kernel`: tests on another kernel of Debian's, in a virtual machine.
//!
//! The machine is emulated, so that it needs no permission and runs in other virtual
//! machines too; it is some ten times slower than this one. It sees this machine's files,
//! and what it writes stays in its memory: what is built here runs there, and nothing here
//! changes.

mod image;
mod machine;

use anyhow::Result;

use self::image::Image;
pub(crate) use self::machine::Machine;
use crate::{
    setup::{self, Purpose},
    test::Tests,
};

/// The kernels on which tests are run besides the machine's own: Debian 12's, and its
/// backport.
pub(crate) const ALL: [&str; 2] = ["6.1", "6.12"];

/// What runs on other kernels: a program of tests, and its arguments. It is what depends on
/// the kernel, and what fits into some minutes; an emulated machine is too slow for sixty
/// pods within the patience of a call.
const SUITES: &[(&str, &[&str])] = &[
    ("bpf_bridge", &["datapath"]),
    ("kernel", &[]),
    ("lifecycle", &["--skip=sixty_pods_at_once"]),
];

/// Runs tests on Debian's newest kernel of a version: [`SUITES`], or with `arguments` all
/// that these choose.
pub(crate) fn test(version: &str, arguments: &[String]) -> Result<()> {
    let mut machine = machine(version)?;
    let tests = Tests::build()?;
    for (variable, value) in &tests.environment {
        machine.set(variable, value.as_os_str());
    }
    // What it writes to is a terminal, but nobody's.
    let plain = ["--color=never"];
    if arguments.is_empty() {
        for (name, filters) in SUITES {
            machine.run(tests.program(name)?, plain.iter().chain(*filters));
        }
    } else {
        for (_, program) in &tests.programs {
            let arguments = arguments.iter().map(String::as_str);
            machine.run(program, plain.into_iter().chain(arguments));
        }
    }
    machine.boot()?;
    Ok(())
}

/// A virtual machine with Debian's newest kernel of a version.
pub(crate) fn machine(version: &str) -> Result<Machine> {
    setup::programs(Purpose::Kernel)?;
    Machine::new(Image::provide(version)?)
}
