//! The programs that switch the frames of bpf-bridge.
//!
//! | file | hook |
//! |---|---|
//! | [`port`] | tc ingress of every port: each frame that a pod or the host sends into a network |
//! | [`guard`] | called by `port` for what may say something of addresses |
//! | [`responder`] | called by `guard` for broadcasts that may be neighbour requests |
//! | [`flood`] | called by all of them for what every port must get |
//!
//! What translates is an object of its own, `nat/main.rs`, three of whose programs `port`
//! calls once a network needs them.
//!
//! [`maps`] has the tables, and the `bpf-bridge-common` crate their layouts.
//! Minimum kernel: 5.10 (`bpf_redirect_peer`).
#![no_std]
#![no_main]
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "a key that is not borrowed is copied once more"
)]

mod flood;
mod guard;
mod maps;
mod port;
mod responder;
mod shared;

/// The kernel gives its GPL-only helpers to programs that say this.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier refuses a program that could loop here.
    loop {}
}
