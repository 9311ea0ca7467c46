//! The table of published ports: who serves what.
//!
//! Claims are made one by one with `BPF_NOEXIST`, which the kernel's batches do not
//! know: the first who writes an entry has the number, whatever else goes wrong.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use bpf_bridge_common::layout::{Address, PUBLISHED_XDP, Published, PublishedKey};
use serde::{Deserialize, Serialize};

use super::{
    super::{ANY, Error, Wire, entries, failed, get, refilled, remove, set},
    NOEXIST, Nat, address, is_taken, octets,
};
use crate::mac::MacAddr;

/// One number of one protocol on an address of the node, or on all of a family: what a
/// pod can claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NodePort {
    /// The address; the unspecified one stands for all of its family.
    pub address: IpAddr,
    /// The number.
    pub port: u16,
    /// The protocol's number in the IP header.
    pub protocol: u8,
}

impl NodePort {
    fn key(&self) -> PublishedKey {
        PublishedKey {
            address: octets(self.address),
            port: self.port,
            protocol: self.protocol,
            reserved: 0,
        }
    }

    fn of(key: PublishedKey) -> Self {
        Self {
            address: address(key.address),
            port: key.port,
            protocol: key.protocol,
        }
    }

    /// The same number on all addresses of the family.
    fn everywhere(&self) -> Self {
        let address = match self.address {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        Self { address, ..*self }
    }

    fn is_everywhere(&self) -> bool {
        self.address.is_unspecified()
    }
}

impl std::fmt::Display for NodePort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let protocol = match self.protocol {
            6 => "tcp",
            17 => "udp",
            _ => "sctp",
        };
        let address = SocketAddr::new(self.address, self.port);
        write!(f, "{address}/{protocol}")
    }
}

/// Who serves a claimed port.
#[derive(Clone, Copy, Debug)]
pub struct Service {
    /// The ifindex of the pod's host veth: the owner.
    pub port: u32,
    /// The pod's segment.
    pub segment: u32,
    /// The pod's address, of the family of the claim.
    pub address: IpAddr,
    /// The port that the pod listens on.
    pub pod_port: u16,
    /// The pod's MAC address.
    pub mac: MacAddr,
    /// The gateway's address of the family, if it has one.
    pub gateway: Option<IpAddr>,
    /// The gateway's MAC address.
    pub gateway_mac: MacAddr,
    /// Whether the pod's end of the veth takes what XDP redirects.
    pub xdp: bool,
}

impl Service {
    fn entry(&self) -> Published {
        Published {
            address: octets(self.address),
            gateway: self.gateway.map_or(Address::UNSPECIFIED, octets),
            port: self.port,
            segment: self.segment,
            specific: 0,
            pod_port: self.pod_port,
            mac: self.mac.octets(),
            gateway_mac: self.gateway_mac.octets(),
            flags: if self.xdp { PUBLISHED_XDP } else { 0 },
        }
    }
}

impl Nat<'_> {
    /// The ifindex of the host veth whose pod serves a port.
    ///
    /// # Errors
    ///
    /// The table cannot be read.
    pub fn owner(&self, port: &NodePort) -> Result<Option<u32>, Error> {
        let entry = self.entry(port)?;
        Ok(entry
            .filter(|entry| entry.specific == 0)
            .map(|entry| entry.port))
    }

    fn entry(&self, port: &NodePort) -> Result<Option<Published>, Error> {
        get(&self.published, "PUBLISHED", port.key())
    }

    /// Claims a port.
    ///
    /// # Errors
    ///
    /// [`Error::Taken`] if somebody has it, on this address or on one that it stands
    /// for; or the table cannot be read or written.
    pub fn claim(&mut self, port: &NodePort, service: &Service) -> Result<(), Error> {
        if port.is_everywhere() {
            return self.insert(port, service.entry());
        }
        self.count(port, 1)?;
        let claimed = self.insert(port, service.entry());
        if claimed.is_err() {
            self.count(port, -1)?;
        }
        claimed
    }

    fn insert(&mut self, port: &NodePort, entry: Published) -> Result<(), Error> {
        loop {
            let written = refilled("PUBLISHED", || {
                self.published
                    .insert(Wire(port.key()), Wire(entry), NOEXIST)
            });
            match written {
                Ok(()) => return Ok(()),
                Err(error) if is_taken(&error) => {
                    if let Some(taken) = self.taken(port)? {
                        return Err(taken);
                    }
                }
                Err(source) => {
                    return Err(failed("claiming", "PUBLISHED", &port.to_string(), source));
                }
            }
        }
    }

    /// The error about a port that is taken. It is not if only a count is in the way,
    /// of a call that was killed between the count and what it counts; that goes.
    fn taken(&mut self, port: &NodePort) -> Result<Option<Error>, Error> {
        let error = |taken: NodePort, entry: &Published| {
            Some(Error::Taken {
                port: *port,
                taken,
                owner: entry.port,
            })
        };
        if let Some(entry) = self.entry(port)?.filter(|entry| entry.specific == 0) {
            return Ok(error(*port, &entry));
        }
        // On single addresses, of which there are few. Looked for only to name one.
        let key = port.key();
        let found = entries(&self.published, "PUBLISHED")?
            .into_iter()
            .find(|(other, entry)| {
                (other.port, other.protocol) == (key.port, key.protocol)
                    && entry.specific == 0
                    && address(other.address).is_ipv4() == port.address.is_ipv4()
            });
        let Some((other, entry)) = found else {
            remove(&mut self.published, "PUBLISHED", key)?;
            return Ok(None);
        };
        Ok(error(NodePort::of(other), &entry))
    }

    /// Keeps count of the addresses that a number is published on.
    fn count(&mut self, port: &NodePort, change: i32) -> Result<(), Error> {
        let everywhere = port.everywhere();
        let key = everywhere.key();
        let entry = self.entry(&everywhere)?;
        match entry {
            Some(entry) if entry.specific == 0 => {
                if change > 0 {
                    return Err(Error::Taken {
                        port: *port,
                        taken: everywhere,
                        owner: entry.port,
                    });
                }
                Ok(())
            }
            entry => {
                let count = entry
                    .map_or(0, |entry| entry.specific)
                    .saturating_add_signed(change);
                if count == 0 {
                    return remove(&mut self.published, "PUBLISHED", key);
                }
                let counted = Published {
                    specific: count,
                    ..Service::NOBODY
                };
                set(&mut self.published, "PUBLISHED", key, counted, ANY)
            }
        }
    }

    /// Counts anew on how many addresses a number is published. It looks at every entry,
    /// if there is a count.
    fn recount(&mut self, port: &NodePort) -> Result<(), Error> {
        let everywhere = port.everywhere();
        let Some(counted) = self.entry(&everywhere)?.filter(|it| it.specific != 0) else {
            return Ok(());
        };
        let key = everywhere.key();
        let claims = entries(&self.published, "PUBLISHED")?
            .into_iter()
            .filter(|(_, entry)| entry.specific == 0)
            .filter(|(other, _)| NodePort::of(*other).everywhere() == everywhere)
            .count();
        match u32::try_from(claims).unwrap_or(u32::MAX) {
            0 => remove(&mut self.published, "PUBLISHED", key),
            specific if specific == counted.specific => Ok(()),
            specific => {
                let counted = Published {
                    specific,
                    ..counted
                };
                set(&mut self.published, "PUBLISHED", key, counted, ANY)
            }
        }
    }

    /// Gives a port back, if it is `owner`'s; says who served it.
    ///
    /// # Errors
    ///
    /// The table cannot be read or written.
    pub fn withdraw(&mut self, port: &NodePort, owner: u32) -> Result<Option<SocketAddr>, Error> {
        let own = |entry: &Published| entry.port == owner && entry.specific == 0;
        let Some(entry) = self.entry(port)?.filter(own) else {
            // A call that was killed may have counted it, and come no further.
            self.recount(port)?;
            return Ok(None);
        };
        remove(&mut self.published, "PUBLISHED", port.key())?;
        if !port.is_everywhere() {
            self.count(port, -1)?;
        }
        Ok(Some(SocketAddr::new(
            address(entry.address),
            entry.pod_port,
        )))
    }

    /// Gives back all that `owner` has. It looks at every entry, so it is for owners of
    /// which nobody has a record.
    ///
    /// # Errors
    ///
    /// The table cannot be read or written.
    pub fn withdraw_all(&mut self, owner: u32) -> Result<(), Error> {
        for (key, entry) in entries(&self.published, "PUBLISHED")? {
            if entry.port == owner {
                self.withdraw(&NodePort::of(key), owner)?;
            }
        }
        Ok(())
    }

    /// Removes the claims of owners that are gone, and counts the others anew.
    pub(super) fn sweep_published(&mut self) -> Result<(), Error> {
        let mut counts = HashMap::<PublishedKey, u32>::new();
        let mut counted = Vec::new();
        for (key, entry) in entries(&self.published, "PUBLISHED")? {
            if entry.specific != 0 {
                counted.push((key, entry.specific));
            } else if self.datapath.port(entry.port)?.is_none() {
                remove(&mut self.published, "PUBLISHED", key)?;
            } else {
                let port = NodePort::of(key);
                if !port.is_everywhere() {
                    *counts.entry(port.everywhere().key()).or_default() += 1;
                }
            }
        }
        for (key, count) in counted {
            match counts.get(&key) {
                None => remove(&mut self.published, "PUBLISHED", key)?,
                Some(&real) if real != count => {
                    let counted = Published {
                        specific: real,
                        ..Service::NOBODY
                    };
                    set(&mut self.published, "PUBLISHED", key, counted, ANY)?;
                }
                Some(_) => {}
            }
        }
        Ok(())
    }
}

impl Service {
    /// What stands in an entry that only counts.
    const NOBODY: Published = Published {
        address: Address::UNSPECIFIED,
        gateway: Address::UNSPECIFIED,
        port: 0,
        segment: 0,
        specific: 0,
        pod_port: 0,
        mac: [0; 6],
        gateway_mac: [0; 6],
        flags: 0,
    };
}
