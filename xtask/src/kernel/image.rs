//! A kernel of Debian's: fetched, unpacked below `target/`, not installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{self, Command},
};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::{
    debian,
    process::{output, run, target_directory},
};

/// A kernel and its modules.
pub(super) struct Image {
    /// What `depmod` and `modprobe` call a base directory.
    directory: PathBuf,
    /// Its full version, `uname -r`.
    pub(super) release: String,
}

impl Image {
    /// Provides Debian's newest kernel of a version (`6.1`): the one that is there, else
    /// one from Debian's archive.
    pub(super) fn provide(version: &str) -> Result<Self> {
        let directory = target_directory().join("kernels").join(version);
        if !directory.exists() {
            // Beside it, and moved when it is complete.
            let new = directory.with_extension(format!("{}.new", process::id()));
            let result = fetch(version, &new).and_then(|()| {
                fs::rename(&new, &directory)
                    .with_context(|| format!("creating {}", directory.display()))
            });
            let _ = fs::remove_dir_all(&new);
            result?;
        }
        let image = Self {
            release: release(&directory)?,
            directory,
        };
        println!("kernel {version}: {}", image.release);
        Ok(image)
    }

    /// The kernel itself.
    pub(super) fn kernel(&self) -> PathBuf {
        self.directory
            .join(format!("boot/vmlinuz-{}", self.release))
    }

    /// Where its modules are.
    pub(super) fn modules(&self) -> PathBuf {
        modules(&self.directory).join(&self.release)
    }

    /// The files of modules, each behind those that it needs.
    pub(super) fn with_dependencies(&self, modules: &[&str]) -> Result<Vec<PathBuf>> {
        let lines = output(
            Command::new("modprobe")
                .arg("--dirname")
                .arg(&self.directory)
                .args(["--set-version", &self.release])
                .args(["--show-depends", "--all"])
                .args(modules),
        )?;
        let mut files: Vec<PathBuf> = Vec::new();
        // `insmod FILE`, or `builtin NAME`.
        for line in lines.lines() {
            if let Some(file) = line.strip_prefix("insmod ") {
                let file = file.trim().into();
                if !files.contains(&file) {
                    files.push(file);
                }
            }
        }
        Ok(files)
    }
}

fn modules(directory: &Path) -> PathBuf {
    directory.join("lib/modules")
}

/// What the one kernel in the directory is called.
fn release(directory: &Path) -> Result<String> {
    let modules = modules(directory);
    let mut entries =
        fs::read_dir(&modules).with_context(|| format!("reading {}", modules.display()))?;
    entries
        .next()
        .and_then(|entry| entry.ok()?.file_name().into_string().ok())
        .ok_or_else(|| anyhow!("{} has no kernel's modules", modules.display()))
}

/// Fetches and unpacks a kernel.
fn fetch(version: &str, directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    let package = match newest(version)? {
        Some(package) => package,
        None => {
            debian::update()?;
            newest(version)?.ok_or_else(|| {
                anyhow!("Debian has no kernel {version} for this machine; 6.1 and 6.12 are known")
            })?
        }
    };
    let archive = debian::download(&package, directory)?;
    run(Command::new("dpkg-deb")
        .arg("--extract")
        .arg(&archive)
        .arg(directory))?;
    fs::remove_file(&archive).with_context(|| format!("removing {}", archive.display()))?;
    run(Command::new("depmod")
        .arg("--basedir")
        .arg(directory)
        .arg(release(directory)?))
}

/// The package of the newest kernel of a version, if the lists have one.
fn newest(version: &str) -> Result<Option<String>> {
    if !cfg!(target_arch = "x86_64") {
        bail!("virtual machines are set up for x86_64 only");
    }
    let prefix = format!("linux-image-{version}.");
    let packages = output(Command::new("apt-cache").arg("pkgnames").arg(&prefix))?;
    Ok(packages
        .lines()
        .filter_map(|package| Some((order(package.strip_prefix(&prefix)?)?, package)))
        .max()
        .map(|(_, package)| package.to_owned()))
}

/// What kernels of one version are ordered by: the numbers of `0-56-amd64`, or
/// `111+deb12-amd64`. `None` for other flavours.
fn order(rest: &str) -> Option<Vec<u32>> {
    rest.strip_suffix("-amd64")?
        .split(['-', '+', '.'])
        .map(|part| part.strip_prefix("deb").unwrap_or(part).parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_ordered_by_number_and_of_one_flavour() {
        assert!(order("0-9-amd64") < order("0-56-amd64"));
        assert!(order("99+deb12-amd64") < order("111+deb12-amd64"));
        for other in [
            "0-56-cloud-amd64",
            "0-56-rt-amd64",
            "0-56-amd64-dbg",
            "0-56-amd64-unsigned",
            "111+deb12-arm64",
        ] {
            assert_eq!(order(other), None, "{other}");
        }
    }
}
