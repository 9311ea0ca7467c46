//! Tells aya-ebpf which machine's registers the programs will see, and the linker how to
//! copy.

use std::env;

fn main() {
    if let Err(error) = aya_build::emit_bpf_target_arch_cfg() {
        println!("cargo::error=emitting the bpf target architecture: {error:#}");
    }
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("bpf") {
        // In order, LLVM copies and clears even the three bytes at the end of a key by
        // calling a loop over bytes.
        println!("cargo::rustc-link-arg-bins=--disable-expand-memcpy-in-order");
    }
}
