//! A virtual machine that runs programs of this one under another kernel.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, Permissions},
    io::Write as _,
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use tempfile::TempDir;

use super::image::Image;
use crate::{
    debian,
    process::{find, line, target_directory},
};

/// What the machine needs to see this one's files, besides what is built in.
const MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];
/// The memory that it has, what is written to files included.
const MEMORY: &str = "3G";

/// How long programs may take before the machine counts as hung.
const LIMIT: Duration = Duration::from_secs(40 * 60);

/// A virtual machine that has not booted yet.
pub(crate) struct Machine {
    image: Image,
    /// What both see, and the guest at [`Self::SHARE`].
    share: TempDir,
    script: Vec<u8>,
}

impl Machine {
    /// Where the guest sees [`Self::share`].
    pub(crate) const SHARE: &str = "/mnt";

    /// A machine with a kernel.
    pub(super) fn new(image: Image) -> Result<Self> {
        let share = tempfile::Builder::new()
            .prefix("run-")
            .tempdir_in(target_directory().join("kernels"))
            .context("making a directory for the virtual machine")?;
        Ok(Self {
            image,
            share,
            script: Vec::new(),
        })
    }

    /// The directory that both see.
    fn share(&self) -> &Path {
        self.share.path()
    }

    /// Sets a variable of the environment for what is run after this.
    pub(crate) fn set(&mut self, variable: &str, value: &OsStr) {
        self.script.extend_from_slice(b"export ");
        self.script.extend_from_slice(variable.as_bytes());
        self.script.push(b'=');
        quote(&mut self.script, value);
        self.script.push(b'\n');
    }

    /// Runs a program after what was told before, whatever came of that.
    pub(crate) fn run<A: AsRef<OsStr>>(
        &mut self,
        program: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) {
        quote(&mut self.script, program.as_os_str());
        for argument in arguments {
            self.script.push(b' ');
            quote(&mut self.script, argument.as_ref());
        }
        self.script.extend_from_slice(b" || failed=1\n");
    }

    /// Boots, and shows what the programs write; fails when one of them does. Returns the
    /// directory that both have seen.
    pub(crate) fn boot(mut self) -> Result<TempDir> {
        self.script.extend_from_slice(b"exit $((failed))\n");
        let initramfs = self.initramfs()?;
        let mut guest = b"modules=".to_vec();
        quote(&mut guest, self.image.modules().as_os_str());
        guest.push(b'\n');
        guest.extend_from_slice(include_bytes!("guest.sh"));
        self.put("guest.sh", &guest)?;
        self.put("tests.sh", &self.script)?;
        // The emulator may run code that the kernel is rewriting (static keys) half written,
        // which is the end of the machine ("int3"). A fault of ours would end the next as well.
        let mut again = true;
        loop {
            let mut machine = self.command(&initramfs, emulator()?);
            let mut child = machine
                .spawn()
                .with_context(|| format!("running {}", line(&machine)))?;
            let ended = wait(&mut child, LIMIT)?;
            let status = fs::read_to_string(self.share().join("status"));
            let release = &self.image.release;
            match status.as_deref().map(str::trim) {
                Ok("0") => return Ok(self.share),
                Ok(_) => bail!("tests failed on Linux {release}"),
                Err(_) if ended && again => {
                    println!("the machine with Linux {release} ended before the tests did; again");
                    again = false;
                }
                Err(_) if ended => {
                    bail!("the virtual machine with Linux {release} ended before the tests did")
                }
                Err(_) => {
                    bail!("the virtual machine with Linux {release} took longer than {LIMIT:?}")
                }
            }
        }
    }

    fn command(&self, initramfs: &Path, mut machine: Command) -> Command {
        let cpus = thread::available_parallelism()
            .map_or(1, usize::from)
            .min(4);
        let kernel_arguments = [
            "console=ttyS0 quiet",
            // An oops ends it.
            "oops=panic panic=-1",
            // Slow as it is, it need not be slower.
            "mitigations=off nokaslr nowatchdog rcupdate.rcu_expedited=1",
        ]
        .join(" ");
        let share = |path: &Path, id: &str, readonly: bool| {
            let mut argument = OsString::from(format!("local,id={id},security_model=none,"));
            if readonly {
                argument.push("readonly=on,multidevs=remap,");
            }
            argument.push("path=");
            // A comma is written twice there.
            argument.push(path.to_string_lossy().replace(',', ",,"));
            argument
        };
        machine
            .args(["-nodefaults", "-no-reboot", "-display", "none"])
            .args(["-serial", "stdio", "-m", MEMORY, "-smp", &cpus.to_string()])
            .args(["-accel", "tcg,thread=multi", "-cpu", "max"])
            .arg("-kernel")
            .arg(self.image.kernel())
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", &kernel_arguments])
            .arg("-fsdev")
            .arg(share(Path::new("/"), "host", true))
            .args(["-device", "virtio-9p-pci,fsdev=host,mount_tag=host"])
            .arg("-fsdev")
            .arg(share(self.share(), "share", false))
            .args(["-device", "virtio-9p-pci,fsdev=share,mount_tag=share"])
            .stdin(Stdio::null());
        machine
    }

    /// Makes the file system that the machine begins with, enough to find another.
    fn initramfs(&self) -> Result<PathBuf> {
        let root = self.share().join("initramfs");
        let mut names = Vec::new();
        for name in ["bin", "modules", "proc", "host", "memory", "system"] {
            let directory = root.join(name);
            fs::create_dir_all(&directory)
                .with_context(|| format!("creating {}", directory.display()))?;
            names.push(name.to_owned());
        }
        let busybox = find("busybox").ok_or_else(|| anyhow!("busybox is not there"))?;
        let init = self.put("initramfs/init", include_bytes!("init.sh"))?;
        fs::set_permissions(&init, Permissions::from_mode(0o755))
            .with_context(|| format!("making {} executable", init.display()))?;
        let mut files = vec![(busybox, "bin/busybox".to_owned())];
        for module in self.image.with_dependencies(&MODULES)? {
            let name = module.file_name().unwrap_or_default().to_string_lossy();
            // They are loaded in the order of their names.
            let name = format!("modules/{:02}-{name}", files.len());
            files.push((module, name));
        }
        for (file, name) in files {
            fs::copy(&file, root.join(&name))
                .with_context(|| format!("copying {}", file.display()))?;
            names.push(name);
        }
        names.push("init".to_owned());
        let path = self.share().join("initramfs.cpio");
        let archive =
            File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        let mut cpio = Command::new("cpio");
        cpio.args(["--create", "--format=newc", "--quiet"])
            .current_dir(&root)
            .stdin(Stdio::piped())
            .stdout(archive);
        let mut child = cpio
            .spawn()
            .with_context(|| format!("running {}", line(&cpio)))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin
                .write_all(names.join("\n").as_bytes())
                .with_context(|| format!("writing to {}", line(&cpio)))?;
        }
        let status = child
            .wait()
            .with_context(|| format!("waiting for {}", line(&cpio)))?;
        ensure!(status.success(), "{} failed ({status})", line(&cpio));
        Ok(path)
    }

    /// Writes a file that both see.
    fn put(&self, name: &str, content: &[u8]) -> Result<PathBuf> {
        let path = self.share().join(name);
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }
}

/// The emulator: the machine's own, else Debian's, unpacked and not installed, as it may not
/// go together with other parts of it that are.
fn emulator() -> Result<Command> {
    const NAME: &str = "qemu-system-x86_64";
    if find(NAME).is_some() {
        return Ok(Command::new(NAME));
    }
    let directory = target_directory().join("kernels").join("qemu");
    if !directory.exists() {
        let new = directory.with_extension(format!("{}.new", process::id()));
        fs::create_dir_all(&new).with_context(|| format!("creating {}", new.display()))?;
        let result = debian::unpack("qemu-system-x86", &new).and_then(|()| {
            fs::rename(&new, &directory)
                .with_context(|| format!("creating {}", directory.display()))
        });
        let _ = fs::remove_dir_all(&new);
        result?;
    }
    let libraries = ["usr/lib", "lib"].map(|library| {
        let library = directory.join(library).join("x86_64-linux-gnu");
        library.display().to_string()
    });
    // It finds the rest from where it is itself.
    let mut emulator = Command::new(directory.join("usr/bin").join(NAME));
    emulator.env("LD_LIBRARY_PATH", libraries.join(":"));
    Ok(emulator)
}

/// Writes a word as a shell reads it.
fn quote(script: &mut Vec<u8>, word: &OsStr) {
    script.push(b'\'');
    for &byte in word.as_bytes() {
        match byte {
            b'\'' => script.extend_from_slice(b"'\\''"),
            _ => script.push(byte),
        }
    }
    script.push(b'\'');
}

/// Waits for a process, at most until the limit; says whether it has ended by itself.
fn wait(child: &mut Child, limit: Duration) -> Result<bool> {
    let start = Instant::now();
    while start.elapsed() < limit {
        if child
            .try_wait()
            .context("waiting for the virtual machine")?
            .is_some()
        {
            return Ok(true);
        }
        thread::sleep(Duration::from_millis(100));
    }
    let _ = child.kill();
    let _ = child.wait();
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_words_as_they_were() {
        for word in [
            "",
            "plain",
            "two words",
            "it's",
            "'",
            "$HOME `x` \\ \"",
            "a\nb",
        ] {
            let mut script = b"printf %s ".to_vec();
            quote(&mut script, word.as_ref());
            let shell = Command::new("sh")
                .arg("-c")
                .arg(OsStr::from_bytes(&script))
                .output()
                .unwrap();
            assert_eq!(String::from_utf8_lossy(&shell.stdout), word);
        }
    }
}
