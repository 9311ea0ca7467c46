//! The embedded address store: what the stock `host-local` plugin does, in process.
//!
//! It takes the same configuration and keeps its leases in the same place and format, so
//! that a node can go from the stock plugin to this one and back, or use both at once:
//!
//! ```text
//! <dataDir>/<network>/lock                  flock(2)ed for as long as the directory is worked on
//! <dataDir>/<network>/<address>             a lease: "<container id>\r\n<interface name>"
//! <dataDir>/<network>/last_reserved_ip.<n>  the address that range set n gave out last
//! <dataDir>/.bpf-bridge/<network>/          the index; the stock plugin never looks here
//! ```
//!
//! # The index
//!
//! The stock plugin finds an owner's addresses by reading all leases, at every call. The
//! index has an entry per owner instead, so no call depends on how many leases there are,
//! but for three: a pool of which a long stretch is in use is listed (names only), a pool
//! that is in use whole is gone through for what can be taken back, and garbage collection
//! is what it is.
//!
//! The leases are the truth and the index is made from them again whenever it might not
//! fit: when the system was booted since, or when the network directory is not as the last
//! operation left it. For that every operation sets the directory's modification time
//! itself, to the nanosecond, and notes it in the index. Whatever adds or removes an entry
//! later gives the directory another time. So it is within the same tick too, though before
//! 6.13 the kernel takes file times from a clock that stands still between ticks: that
//! clock's times are not those that are noted. Where the file system does not keep
//! nanoseconds, every call reads all leases.
//!
//! # What is never half done
//!
//! A lease is written to a file without a name, and then given its name: all
//! addresses of an attachment are names of one file. The entry is written before them and
//! removed after them, and the directory's time is set last. Whatever dies in between
//! leaves a time that does not fit, and the next operation looks at everything.
//!
//! Nothing of that waits for the disk. A power failure ends the boot, and with it all pods, so
//! that leases of ours that it loses are missed by nobody, and those that it tears or brings
//! back are of an earlier boot and go away with the rest of them. (The removal of one that
//! another program wrote is synced; so is all, where the system does not tell its boots apart.)
//!
//! # Taking back
//!
//! A lease that this program wrote is taken back when the system was booted since, or, if
//! its range set has no other address left or its owner asks again, when its owner's host
//! veth does not exist. A lease is never taken while the [`Lease`] value of its making is
//! held, that is, before there is a host veth.
//!
//! Whether the owner of what another program wrote lives cannot be known here, so it is
//! removed by its owner's DEL and by garbage collection; and, if a range set has no other
//! address left, when it was seen here in an earlier boot and names an interface (one that
//! does not may be somebody's reservation by hand).

mod config;
mod directory;
mod index;
mod range;
mod store;
#[cfg(test)]
mod tests;

pub use config::{Config, ConfigError, DEFAULT_DATA_DIR, Requests, data_dir};
pub use range::{Range, RangeError, RangeSet};
pub use store::{Allocation, Lease, Owner, Store, StoreError};
