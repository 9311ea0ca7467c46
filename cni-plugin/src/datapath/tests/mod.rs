//! The programs, one frame at a time: frame in; verdict, bytes, copies, counters
//! and what was learned out.
//!
//! | module | what it has |
//! |---|---|
//! | [`bench`] | the programs and maps, loaded without a pin, and a segment to run them in |
//! | [`frames`] | the frames |
//! | [`switching`] | `port`: what becomes of a frame |
//! | [`learning`] | `port`: addresses that nobody was assigned |
//! | [`neighbours`] | `responder` |
//! | [`claims`] | `guard`: what pods say of addresses |
//! | [`flooding`] | `flood`, for lists of all lengths |
//! | [`wire`] | the same through real devices: where a redirect really leads |
//! | [`published`] | the programs of published ports |
//! | [`programs`] | what the verifier and the log say |
//!
//! They need root; the machine's bpffs and network namespace stay as they are.

mod bench;
mod claims;
mod flooding;
mod frames;
mod learning;
mod neighbours;
mod programs;
mod published;
mod switching;
mod wire;
