//! Another build of the plugin, without building one.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

/// The released programs, as another build of them would be: in the copy of the binary,
/// their idea of how long 300 s and 120 s are is longer by `number` ns. It is put into
/// `directory`, under the name of the plugin.
///
/// # Errors
///
/// That there are no such programs in it, or the copy cannot be written.
pub fn another_build(of: &Path, directory: &Path, number: u8) -> Result<PathBuf> {
    let mut bytes = fs::read(of).with_context(|| format!("reading {}", of.display()))?;
    let mut changed = 0;
    // The compiler may ask for more than a nanosecond less.
    for time in [
        300_000_000_000_u64,
        299_999_999_999,
        120_000_000_000,
        119_999_999_999,
    ] {
        let [low, high] = [time as u32, (time >> 32) as u32].map(u32::to_le_bytes);
        // The only instruction of two words loads a number of 64 bits (`BPF_LD | BPF_DW`):
        // opcode, registers, the lower half of the number, and in the same places of the
        // second word nothing, nothing, the upper half.
        for at in (0..bytes.len() - 16).step_by(4) {
            if bytes[at] == 0x18
                && bytes[at + 1] < 10
                && bytes[at + 2..at + 4] == [0; 2]
                && bytes[at + 4..at + 8] == low
                && bytes[at + 8..at + 12] == [0; 4]
                && bytes[at + 12..at + 16] == high
            {
                bytes[at + 4] = bytes[at + 4].wrapping_add(number);
                changed += 1;
            }
        }
    }
    ensure!(
        changed > 2,
        "{changed} places in {} were changed",
        of.display()
    );
    fs::create_dir_all(directory)?;
    let (raw, path) = (directory.join("raw"), directory.join("bpf-bridge"));
    fs::write(&raw, bytes)?;
    // Another process writes what will be executed: a descriptor of this one could be
    // inherited by what other threads start, and the file be busy for that.
    let copied = Command::new("install")
        .args(["-m", "755"])
        .args([&raw, &path])
        .status()?;
    ensure!(copied.success(), "copying {}", raw.display());
    fs::remove_file(raw)?;
    Ok(path)
}
