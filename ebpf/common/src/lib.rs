//! What the eBPF programs and the plugin must agree on: the layouts of the maps,
//! and the packet logic that is worth testing without a kernel.
//!
//! Nothing here allocates, calls a helper or knows of aya: the same code is
//! compiled for the bpf target and for the host.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod checksum;
pub mod drops;
pub mod frame;
pub mod guard;
pub mod layout;
pub mod packet;
pub mod responder;
pub mod translate;

#[cfg(test)]
mod testing;
