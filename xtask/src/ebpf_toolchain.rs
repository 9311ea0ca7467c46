//! Which Rust toolchain compiles the eBPF programs.
//!
//! `cargo xtask` and `cni-plugin/build.rs` both compile this file, so that what
//! the set-up prepares is what the build uses.
//!
//! The programs are for `bpfel-unknown-none` (or `bpfeb`), a target that comes
//! without a precompiled `core`: the toolchain must have core's source. The
//! linker is `bpf-linker`, which reads the LLVM bitcode that rustc wrote: its
//! LLVM must not be older than rustc's. Stable does, with `RUSTC_BOOTSTRAP=1`
//! for cargo's `-Z build-std`.

use std::{
    env,
    ffi::OsString,
    fmt, fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use anyhow::{Context as _, Result, anyhow, bail};

/// Names the toolchain to use (as `rustup run` takes it), instead of a choice
/// made here.
pub(crate) const TOOLCHAIN_VARIABLE: &str = "BPF_BRIDGE_EBPF_TOOLCHAIN";

/// The name that `cargo xtask setup` gives rustup for Debian's Rust.
pub(crate) const DEBIAN_TOOLCHAIN: &str = "bpf-bridge-debian";

/// A version of LLVM: major, minor, patch level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LlvmVersion(pub(crate) u32, u32, u32);

impl fmt::Display for LlvmVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl LlvmVersion {
    /// Reads the three leading numbers of `22.1.8` or `22.1.8-rust-1.96`.
    fn parse(text: &str) -> Option<Self> {
        let mut numbers = text
            .split(|c: char| !c.is_ascii_digit())
            .map(|number| number.parse().ok());
        Some(Self(numbers.next()??, numbers.next()??, numbers.next()??))
    }
}

/// A toolchain, named as `rustup run` takes it.
#[derive(Clone, Debug)]
pub(crate) struct Toolchain {
    /// A toolchain's name or the absolute path of its directory.
    pub(crate) name: String,
    rustc: Vec<OsString>,
    /// The version of LLVM in its rustc.
    pub(crate) llvm: LlvmVersion,
    sysroot: PathBuf,
}

impl Toolchain {
    /// The toolchain that runs this build.
    pub(crate) fn current() -> Result<Self> {
        // cargo tells build scripts which rustc it uses.
        let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        Self::inspect(None, vec![rustc])
    }

    /// A toolchain that rustup knows by `name`.
    pub(crate) fn named(name: &str) -> Result<Self> {
        let rustc = ["rustup", "run", name, "rustc"].map(OsString::from);
        Self::inspect(Some(name), rustc.into())
    }

    fn inspect(name: Option<&str>, rustc: Vec<OsString>) -> Result<Self> {
        let sysroot = text(command(&rustc).args(["--print", "sysroot"]))?;
        let version = text(command(&rustc).arg("-vV"))?;
        let llvm = version
            .lines()
            .find_map(|line| line.strip_prefix("LLVM version: "))
            .and_then(LlvmVersion::parse)
            .ok_or_else(|| anyhow!("no LLVM version in the output of {rustc:?} -vV: {version}"))?;
        let sysroot = sysroot.trim_end();
        Ok(Self {
            name: name.unwrap_or(sysroot).to_owned(),
            rustc,
            llvm,
            sysroot: sysroot.into(),
        })
    }

    /// A program of this toolchain: cargo, rustc, …
    #[allow(dead_code, reason = "for the commands; the build has aya-build's")]
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("rustup");
        command.args(["run", &self.name, program]);
        command
    }

    /// Whether `-Z build-std=core` finds what it compiles.
    pub(crate) fn has_core_source(&self) -> bool {
        self.sysroot
            .join("lib/rustlib/src/rust/library/core/src/lib.rs")
            .exists()
    }

    /// The LLVM version of the `bpf-linker` on the PATH, which has linked a
    /// small module of this toolchain's; `scratch` is a directory for it.
    ///
    /// bpf-linker tells its own version but not LLVM's, and can be linked with
    /// LLVM either way, so that its libraries do not tell either. But it writes
    /// bitcode when asked to, and LLVM signs all bitcode with its version.
    pub(crate) fn linker_llvm(&self, scratch: &Path) -> Result<LlvmVersion> {
        fs::create_dir_all(scratch).with_context(|| format!("creating {}", scratch.display()))?;
        let input = scratch.join("trial-link-input.bc");
        let output = scratch.join("trial-link-output.bc");

        let mut rustc = command(&self.rustc);
        rustc
            .args(["--crate-type=lib", "--crate-name=trial", "--emit=llvm-bc"])
            .args(["--target=bpfel-unknown-none", "-o"])
            .arg(&input)
            .arg("-")
            .env("RUSTC_BOOTSTRAP", "1");
        run(&mut rustc, "#![feature(no_core)]\n#![no_core]\n")?;

        let mut linker = Command::new("bpf-linker");
        linker
            .args(["--emit=llvm-bc", "-o"])
            .arg(&output)
            .arg(&input);
        run(&mut linker, "")?;

        let bitcode = fs::read(&output).with_context(|| format!("reading {}", output.display()))?;
        bitcode_producer(&bitcode)
            .ok_or_else(|| anyhow!("bpf-linker's bitcode does not tell the version of its LLVM"))
    }

    /// Whether the programs can be built with this toolchain; the error says
    /// what is missing.
    pub(crate) fn check(&self, scratch: &Path) -> Result<()> {
        if !self.has_core_source() {
            bail!("the toolchain {} lacks core's source (rust-src)", self.name);
        }
        let linker = self
            .linker_llvm(scratch)
            .with_context(|| format!("linking with bpf-linker what {} compiled", self.name))?;
        if linker < self.llvm {
            bail!(
                "bpf-linker's LLVM {linker} is older than LLVM {} of the toolchain {}",
                self.llvm,
                self.name
            );
        }
        Ok(())
    }
}

/// The toolchain that compiles the programs: the one that
/// [`TOOLCHAIN_VARIABLE`] names, else the current one if it can, else Debian's.
pub(crate) fn choose(scratch: &Path) -> Result<Toolchain> {
    if let Some(name) = env::var_os(TOOLCHAIN_VARIABLE).filter(|name| !name.is_empty()) {
        let name = name
            .to_str()
            .ok_or_else(|| anyhow!("{TOOLCHAIN_VARIABLE}={name:?} is not a toolchain's name"))?;
        let toolchain = Toolchain::named(name)
            .with_context(|| format!("using the toolchain of {TOOLCHAIN_VARIABLE}={name}"))?;
        toolchain.check(scratch)?;
        return Ok(toolchain);
    }
    let current = Toolchain::current()?;
    let Err(error) = current.check(scratch) else {
        return Ok(current);
    };
    let debian = Toolchain::named(DEBIAN_TOOLCHAIN)
        .and_then(|debian| debian.check(scratch).map(|()| debian));
    // Without Debian's, what the current one lacks is what the user wants to know.
    debian.map_err(|_| error)
}

/// A command from its program and first arguments.
fn command(words: &[OsString]) -> Command {
    let mut words = words.iter();
    let mut command = Command::new(words.next().map_or("".as_ref(), OsString::as_os_str));
    command.args(words);
    command
}

/// Runs `command` with `stdin` and returns what it wrote; the error of a failed
/// command carries what it wrote to stderr.
fn run(command: &mut Command, stdin: &str) -> Result<Output> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("running {command:?}"))?;
    if let Some(mut pipe) = child.stdin.take() {
        // A child that does not read its stdin is no failure; one that failed
        // before it could tells so by its status.
        let _ = pipe.write_all(stdin.as_bytes());
    }
    let output = child
        .wait_with_output()
        .with_context(|| format!("waiting for {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(output)
}

fn text(command: &mut Command) -> Result<String> {
    let output = run(command, "")?;
    String::from_utf8(output.stdout).with_context(|| format!("{command:?} wrote no UTF-8"))
}

/// The version of the LLVM that wrote `bitcode`.
///
/// It stands in the identification block as the string `LLVM22.1.8`, six bits
/// a character and at no byte boundary
/// (<https://llvm.org/docs/BitCodeFormat.html#identification-block>). The block
/// is at the start, so searching it for the string does instead of a parser.
fn bitcode_producer(bitcode: &[u8]) -> Option<LlvmVersion> {
    const CHAR6: &[u8; 64] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._";
    let start = bitcode.get(..64)?;
    let bit = |at: usize| {
        start
            .get(at / 8)
            .map(|byte| usize::from(byte >> (at % 8) & 1))
    };
    let char6 = |at: usize| {
        (0..6)
            .try_fold(0, |value, i| Some(value | bit(at + i)? << i))
            .map(|value| char::from(CHAR6[value]))
    };
    (0..start.len() * 8).find_map(|offset| {
        let text: String = (offset..).step_by(6).map_while(char6).collect();
        LlvmVersion::parse(text.strip_prefix("LLVM")?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_producer_is_read_from_bitcode() {
        // The first bytes of what bpf-linker 0.13.0 wrote with LLVM 22.1.8.
        let start = [
            0x42, 0x43, 0xc0, 0xde, 0x35, 0x14, 0x00, 0x00, 0x05, 0x00, 0x00, 0x00, 0x62, 0x0c,
            0x30, 0x24, 0x4a, 0x59, 0xbe, 0xa6, 0x6d, 0xfb, 0xb5, 0xcf, 0x0b, 0x51, 0x80, 0x4c,
            0x01, 0x00, 0x00, 0x00,
        ];
        let mut bitcode = [0; 128];
        bitcode[..start.len()].copy_from_slice(&start);
        assert_eq!(bitcode_producer(&bitcode), Some(LlvmVersion(22, 1, 8)));
        assert_eq!(bitcode_producer(&bitcode[..20]), None);
        assert_eq!(bitcode_producer(&[0; 128]), None);
    }

    #[test]
    fn versions_are_ordered_by_number() {
        let parse = |text| LlvmVersion::parse(text).unwrap();
        assert!(parse("22.1.10") > parse("22.1.8-rust-1.96.0-stable"));
        assert_eq!(LlvmVersion::parse("22.1"), None);
        assert_eq!(LlvmVersion::parse("twenty.two.1"), None);
    }
}
