//! Builds the eBPF programs and leaves the object at
//! `$OUT_DIR/bpf-bridge-datapath`, for the plugin to embed.

use std::{
    env, fs, io,
    os::unix,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow};

#[path = "../xtask/src/ebpf_toolchain.rs"]
mod ebpf_toolchain;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=../xtask/src/ebpf_toolchain.rs");
    println!(
        "cargo::rerun-if-env-changed={}",
        ebpf_toolchain::TOOLCHAIN_VARIABLE
    );
    let built = if env::var_os("CARGO_CFG_FUZZING").is_some() {
        leave_out()
    } else {
        build()
    };
    if let Err(error) = built {
        // cargo shows one line for each of these.
        let error = format!("{error:#}").replace('\n', " ");
        println!("cargo::error=building the eBPF programs: {error}");
    }
}

fn build() -> Result<()> {
    let out_dir = out_dir()?;
    let toolchain = ebpf_toolchain::choose(&out_dir)
        .context("no toolchain that can; run `cargo xtask setup`")?;
    share_target_directory(&out_dir)?;

    // SAFETY: no other thread has been started that could read the environment.
    unsafe {
        // Lets stable take `-Z build-std`; aya-build looks for it too.
        env::set_var("RUSTC_BOOTSTRAP", "1");
        // aya-build repeats what this cargo writes as warnings of this package.
        env::set_var("CARGO_TERM_QUIET", "true");
    }
    let features: &[&str] = match env::var_os("CARGO_FEATURE_NEXT_LAYOUT") {
        Some(_) => &["next-layout"],
        None => &[],
    };
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "bpf-bridge-ebpf",
            root_dir: "../ebpf",
            features,
            ..Default::default()
        }],
        aya_build::Toolchain::Custom(&toolchain.name),
    )
}

/// Leaves empty objects: a fuzz target has no kernel to load programs into.
fn leave_out() -> Result<()> {
    let out_dir = out_dir()?;
    for object in ["bpf-bridge-datapath", "bpf-bridge-nat"] {
        let path = out_dir.join(object);
        fs::write(&path, []).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn out_dir() -> Result<PathBuf> {
    let out_dir = env::var_os("OUT_DIR").ok_or_else(|| anyhow!("OUT_DIR is not set"))?;
    Ok(out_dir.into())
}

/// Lets all runs of this script (check, clippy, dev, release) build the
/// programs in one directory, so that only the first pays for it.
///
/// aya-build has its cargo work in `$OUT_DIR/aya-build/target`.
fn share_target_directory(out_dir: &Path) -> Result<()> {
    // cargo puts this tag at the top of what it builds in, and in the directory
    // of each target below.
    let Some(top) = out_dir
        .ancestors()
        .filter(|directory| directory.join("CACHEDIR.TAG").exists())
        .last()
    else {
        return Ok(());
    };
    let shared = top.join("ebpf");
    let link = out_dir.join("aya-build").join("target");
    let create = || {
        fs::create_dir_all(&shared)?;
        fs::create_dir_all(out_dir.join("aya-build"))?;
        match unix::fs::symlink(&shared, &link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        }
    };
    create().with_context(|| format!("linking {} to {}", link.display(), shared.display()))
}
