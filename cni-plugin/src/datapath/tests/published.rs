//! The programs of published ports, one packet at a time: frame in; verdict, bytes,
//! flows and counters out.
//!
//! | module | what it has |
//! |---|---|
//! | [`stage`] | a node with uplinks, two networks and the programs |
//! | [`packets`] | the packets |
//! | [`requests`] | what leads to a pod, and what does not |
//! | [`replies`] | what comes back |
//! | [`flows`] | two clients that would look the same to the pod; memory that is lost |
//! | [`xdp`] | the plain ones among the requests, before tc |
//! | [`errors`] | ICMP and ICMPv6 errors |
//! | [`fragments`] | fragments |
//! | [`hostile`] | packets that lie |
//!
//! Every translation is run twice: once with nothing known of the packet's checksums,
//! and once with a device's sum over the packet, which the kernel holds against the
//! result. The hooks on sockets cannot be run this way.

mod errors;
mod flows;
mod fragments;
mod hostile;
mod packets;
mod replies;
mod requests;
mod stage;
mod xdp;
