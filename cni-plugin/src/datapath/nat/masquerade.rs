//! The tables of masqueraded pods, and of the destinations for which they are not.

use std::{collections::HashSet, net::IpAddr};

use aya::maps::lpm_trie;
use bpf_bridge_common::layout::{Address, ExemptKey, Masqueraded, PodKey};
use ipnet::IpNet;

use super::{
    super::{ANY, Error, Wire, entries, failed, get, refilled, remove, removed, set},
    NOEXIST, Nat, is_taken, octets,
};
use crate::attachment::hash;

/// How many bits of an exempt destination's key are the policy's number.
const POLICY_BITS: u32 = 64;
/// How many come before an IPv4 address that is mapped into IPv6.
const MAPPED_BITS: u32 = 96;

type Prefix = lpm_trie::Key<Wire<ExemptKey>>;

/// A list of destinations for which pods are not masqueraded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    number: u64,
    exempt: Vec<IpNet>,
}

impl Policy {
    /// The policy of these destinations. Its number follows from them, in whatever order
    /// they come.
    pub fn new(exempt: impl IntoIterator<Item = IpNet>) -> Self {
        let mut exempt: Vec<IpNet> = exempt.into_iter().map(|net| net.trunc()).collect();
        exempt.sort_unstable();
        exempt.dedup();
        let list: Vec<String> = exempt.iter().map(IpNet::to_string).collect();
        Self {
            // 0 is none.
            number: hash(["exempt", &list.join(" ")]).max(1),
            exempt,
        }
    }

    fn prefixes(&self) -> impl Iterator<Item = Prefix> {
        self.exempt.iter().map(move |net| {
            let mapped = match net {
                IpNet::V4(_) => MAPPED_BITS,
                IpNet::V6(_) => 0,
            };
            let key = ExemptKey::new(self.number, octets(net.addr()));
            lpm_trie::Key::new(
                POLICY_BITS + mapped + u32::from(net.prefix_len()),
                Wire(key),
            )
        })
    }
}

const fn key(address: IpAddr, segment: u32) -> PodKey {
    PodKey {
        address: octets(address),
        segment,
    }
}

impl Nat<'_> {
    /// Masquerades what a pod sends from this address, except to the destinations of
    /// `policy`.
    ///
    /// # Errors
    ///
    /// [`Error::Assigned`] if another pod has the address, or a table cannot be written.
    pub fn masquerade(
        &mut self,
        address: IpAddr,
        segment: u32,
        policy: &Policy,
        port: u32,
    ) -> Result<(), Error> {
        // What is exempt is known before the pod is.
        self.introduce(policy)?;
        let key = key(address, segment);
        let entry = Masqueraded {
            policy: policy.number,
            port,
            reserved: 0,
        };
        let claimed = refilled("MASQUERADED", || {
            self.masqueraded.insert(Wire(key), Wire(entry), NOEXIST)
        });
        match claimed {
            Err(error) if is_taken(&error) => {}
            Err(source) => return Err(failed("claiming", "MASQUERADED", &address, source)),
            Ok(()) => return Ok(()),
        }
        match get(&self.masqueraded, "MASQUERADED", key)? {
            Some(Masqueraded { port: owner, .. })
                if owner != port && self.datapath.port(owner)?.is_some() =>
            {
                Err(Error::Assigned {
                    address: address.to_string(),
                    port: owner,
                })
            }
            // Its own, or a dead pod's.
            _ => set(&mut self.masqueraded, "MASQUERADED", key, entry, ANY),
        }
    }

    /// The ifindex of the host veth whose pod is masqueraded by this address.
    ///
    /// # Errors
    ///
    /// The table cannot be read.
    pub fn masqueraded(&self, address: IpAddr, segment: u32) -> Result<Option<u32>, Error> {
        let entry = get(&self.masqueraded, "MASQUERADED", key(address, segment))?;
        Ok(entry.map(|entry| entry.port))
    }

    /// No longer masquerades `owner` by this address. What the address has since become
    /// of another pod stays.
    ///
    /// # Errors
    ///
    /// The table cannot be read or written.
    pub fn unmasquerade(&mut self, address: IpAddr, segment: u32, owner: u32) -> Result<(), Error> {
        if self.masqueraded(address, segment)? == Some(owner) {
            remove(&mut self.masqueraded, "MASQUERADED", key(address, segment))?;
        }
        Ok(())
    }

    /// No longer masquerades `owner` at all. It looks at every entry, so it is for
    /// owners of which nobody has a record.
    ///
    /// # Errors
    ///
    /// The table cannot be read or written.
    pub fn unmasquerade_all(&mut self, owner: u32) -> Result<(), Error> {
        for (key, entry) in entries(&self.masqueraded, "MASQUERADED")? {
            if entry.port == owner {
                remove(&mut self.masqueraded, "MASQUERADED", key)?;
            }
        }
        Ok(())
    }

    /// Writes a policy, in place of those that no pod has any more if there is no room.
    fn introduce(&mut self, policy: &Policy) -> Result<(), Error> {
        let written = self.write(policy);
        if !matches!(written, Err(Error::Full { .. })) {
            return written;
        }
        let used = self.sweep_masqueraded()?;
        // A full trie may refuse what it has already.
        if used.contains(&policy.number) {
            return Ok(());
        }
        let written = self.write(policy);
        if written.is_err() {
            self.sweep_masqueraded()?;
        }
        written
    }

    fn write(&mut self, policy: &Policy) -> Result<(), Error> {
        policy.prefixes().try_for_each(|prefix| {
            refilled("EXEMPT", || self.exempt.insert(&prefix, 1, ANY))
                .map_err(|source| failed("writing", "EXEMPT", &policy.exempt, source))
        })
    }

    /// Removes the entries of pods that are gone, and the policies that no pod has.
    /// Returns the numbers of the others.
    pub(super) fn sweep_masqueraded(&mut self) -> Result<HashSet<u64>, Error> {
        let mut policies = HashSet::new();
        let mut used = HashSet::new();
        for (key, entry) in entries(&self.masqueraded, "MASQUERADED")? {
            let port = self.datapath.port(entry.port)?;
            if port.is_some_and(|port| port.segment == key.segment) {
                policies.insert(entry.policy);
                used.extend(
                    [Address::UNSPECIFIED, Address::UNSPECIFIED_V4]
                        .map(|any| ExemptKey::new(entry.policy, any).policy),
                );
            } else {
                remove(&mut self.masqueraded, "MASQUERADED", key)?;
            }
        }
        let prefixes: Vec<Prefix> = self
            .exempt
            .keys()
            .collect::<Result<_, _>>()
            .map_err(|source| failed("listing", "EXEMPT", &"", source))?;
        for prefix in prefixes {
            let Wire(key) = prefix.data();
            if used.contains(&key.policy) {
                continue;
            }
            removed("EXEMPT", || self.exempt.remove(&prefix))
                .map_err(|source| failed("removing", "EXEMPT", &key, source))?;
        }
        Ok(policies)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(nets: &[&str]) -> Policy {
        Policy::new(nets.iter().map(|net| net.parse().unwrap()))
    }

    #[test]
    fn a_policy_is_its_destinations_in_whatever_order() {
        let one = policy(&["10.0.0.0/8", "fd00::/8"]);
        for same in [
            policy(&["fd00::/8", "10.0.0.0/8"]),
            policy(&["10.1.2.3/8", "fd00::1/8", "10.0.0.0/8"]),
        ] {
            assert_eq!(one, same);
        }
        for other in [
            policy(&[]),
            policy(&["10.0.0.0/8"]),
            policy(&["10.0.0.0/9", "fd00::/8"]),
            policy(&["10.0.0.0/8", "fd00::/8", "fd00::/9"]),
        ] {
            assert_ne!(one.number, other.number, "{other:?}");
            assert_ne!(other.number, 0);
        }
    }

    #[test]
    fn prefixes_are_compared_behind_the_policy() {
        let policy = policy(&["10.0.0.0/8", "fd00::/8", "0.0.0.0/0"]);
        let mut found: Vec<_> = policy
            .prefixes()
            .map(|prefix| {
                let Wire(key) = prefix.data();
                let number = policy.number & !1 | u64::from(key.destination.is_v4());
                assert_eq!(
                    bytemuck::bytes_of(&key.policy),
                    number.to_be_bytes().as_slice()
                );
                (prefix.prefix_len(), key.destination)
            })
            .collect();
        found.sort_by_key(|(length, _)| *length);
        let of = |address: &str| octets(address.parse().unwrap());
        assert_eq!(
            found,
            [
                (64 + 8, of("fd00::")),
                (64 + 96, of("0.0.0.0")),
                (64 + 96 + 8, of("10.0.0.0"))
            ]
        );
    }
}
