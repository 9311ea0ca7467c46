//! Packages from Debian.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::process::{find, output, run, succeeds};

/// Installs `packages`, none of which is installed; the error says what to
/// install when that cannot be done here.
///
/// Nothing that is installed is removed for it, and no daemon that comes with a
/// package is started, now or at the next boot.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    let names = packages.join(" ");
    if find("apt-get").is_none() {
        bail!("not on Debian: please install what it calls {names}");
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("not root: please run `apt-get install {names}`");
    }
    println!("setup: installing {names} (Debian)");
    // The lists of a fresh machine are empty or old. Reading new ones takes
    // long, so only when it must be.
    if !succeeds(&mut apt_get("install", packages)) {
        update()
            .and_then(|()| run(apt_get("install", packages).stdout(Stdio::null())))
            .with_context(|| format!("please run `apt-get install {names}`"))?;
    }
    disable_units(packages)
}

/// Reads the lists of packages anew.
pub(crate) fn update() -> Result<()> {
    run(apt_get("update", &[]).stdout(Stdio::null()))
}

/// Downloads a package into a directory, without installing it; returns its path.
pub(crate) fn download(package: &str, directory: &Path) -> Result<PathBuf> {
    println!("setup: downloading {package} (Debian)");
    let download = || {
        run(Command::new("apt-get")
            // By this user, whom the directory belongs to.
            .args([
                "--quiet=2",
                "-oAPT::Sandbox::User=root",
                "download",
                package,
            ])
            .current_dir(directory))
    };
    // The lists may be too old to tell where it is.
    download().or_else(|_| update().and_then(|()| download()))?;
    fs::read_dir(directory)
        .with_context(|| format!("reading {}", directory.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| anyhow!("`apt-get download {package}` left no package"))
}

/// Unpacks a package and all that it needs and is not installed into a directory, for
/// what cannot be installed beside what is there.
pub(crate) fn unpack(package: &str, directory: &Path) -> Result<()> {
    let needed = || {
        output(Command::new("apt-get").args([
            "--simulate",
            "--no-install-recommends",
            "install",
            package,
        ]))
    };
    let needed = needed().or_else(|_| update().and_then(|()| needed()))?;
    // `Inst NAME (VERSION …)`
    let names = needed
        .lines()
        .filter_map(|line| line.strip_prefix("Inst ")?.split_whitespace().next());
    for name in names {
        let archive = download(name, directory)?;
        run(Command::new("dpkg-deb")
            .arg("--extract")
            .arg(&archive)
            .arg(directory))?;
        fs::remove_file(&archive).with_context(|| format!("removing {}", archive.display()))?;
    }
    Ok(())
}

fn apt_get(verb: &str, packages: &[&str]) -> Command {
    let mut apt_get = if Path::new("/run/systemd/system").exists() {
        // Debian's packages start their daemons only where this directory
        // exists: hide it, from apt alone.
        let mut unshare = Command::new("unshare");
        unshare
            .args(["--mount", "sh", "-c"])
            .arg("mount -t tmpfs tmpfs /run/systemd && exec apt-get \"$@\"")
            .arg("apt-get");
        unshare
    } else {
        Command::new("apt-get")
    };
    apt_get
        .args(["--quiet=2", "--yes", "--no-remove"])
        .args(["--no-install-recommends", "-oDpkg::Use-Pty=0", verb])
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive");
    apt_get
}

/// Takes the units of newly installed `packages` out of the next boot.
fn disable_units(packages: &[&str]) -> Result<()> {
    if find("systemctl").is_none() {
        return Ok(());
    }
    let files = Command::new("dpkg")
        .arg("--listfiles")
        .args(packages)
        .output()
        .context("running dpkg --listfiles")?;
    let files = String::from_utf8(files.stdout)
        .map_err(|_| anyhow!("dpkg --listfiles {packages:?} wrote no UTF-8"))?;
    let units: Vec<_> = files
        .lines()
        .filter_map(|file| file.split_once("/lib/systemd/system/"))
        .map(|(_, unit)| unit)
        .filter(|unit| {
            unit.ends_with(".service") || unit.ends_with(".socket") || unit.ends_with(".timer")
        })
        // A template has instances, and only those can be disabled.
        .filter(|unit| !unit.contains(['@', '/']))
        .collect();
    if units.is_empty() {
        return Ok(());
    }
    run(Command::new("systemctl")
        .args(["--quiet", "disable"])
        .args(units))
}
