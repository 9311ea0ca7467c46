//! Ranges of addresses and the order in which they are given out.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;
use thiserror::Error;

/// Why a range or a set of ranges cannot be given out from.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum RangeError {
    /// A set without a range.
    #[error("empty range set: it needs at least one range with a subnet")]
    Empty,
    /// `subnet` is absent from a range.
    #[error("the range has no subnet")]
    NoSubnet,
    /// Fewer than two host bits.
    #[error(
        "network {0} is too small to allocate from: the prefix must leave at least 2 host bits"
    )]
    TooSmall(IpNet),
    /// The subnet's address is not the network's.
    #[error(
        "network {subnet} has host bits set: for a prefix length of {} the network address is {}",
        subnet.prefix_len(), subnet.network()
    )]
    HostBits {
        /// As configured.
        subnet: IpNet,
    },
    /// The address is of the other family, or outside of the subnet.
    #[error("{key} {address} is not in network {subnet}")]
    Outside {
        /// `gateway`, `rangeStart` or `rangeEnd`.
        key: &'static str,
        /// As configured.
        address: IpAddr,
        /// The range's subnet.
        subnet: IpNet,
    },
    /// The range's end lies before its start.
    #[error("rangeEnd {end} is in network {subnet} but before rangeStart {start}")]
    Reversed {
        /// The first address of the range.
        start: IpAddr,
        /// The last address of the range.
        end: IpAddr,
        /// The range's subnet.
        subnet: IpNet,
    },
    /// An end of the range is an IPv4 address in IPv6's notation.
    #[error("range {0} ends among ::ffff:0:0/96, which are IPv4 addresses")]
    Mapped(Box<Range>),
    /// A set is a pool of one family.
    #[error("mixed address families: {0} and {1} cannot be in one range set")]
    MixedFamilies(Box<Range>, Box<Range>),
    /// An address would be in two places.
    #[error("subnets {0} and {1} overlap")]
    Overlap(Box<Range>, Box<Range>),
}

/// A part of a subnet, both ends included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    subnet: IpNet,
    start: IpAddr,
    end: IpAddr,
    gateway: IpAddr,
}

impl Range {
    /// Fills in what is not given, as the stock plugin does: the gateway and the
    /// start are the subnet's first host, the end is the last address of an IPv6
    /// subnet and the one before the broadcast address of an IPv4 subnet.
    ///
    /// # Errors
    /// Every [`RangeError`] that concerns a single range.
    pub fn new(
        subnet: IpNet,
        start: Option<IpAddr>,
        end: Option<IpAddr>,
        gateway: Option<IpAddr>,
    ) -> Result<Self, RangeError> {
        if subnet.max_prefix_len() - subnet.prefix_len() < 2 {
            return Err(RangeError::TooSmall(subnet));
        }
        if subnet.addr() != subnet.network() {
            return Err(RangeError::HostBits { subnet });
        }
        for (key, address) in [
            ("gateway", gateway),
            ("rangeStart", start),
            ("rangeEnd", end),
        ] {
            if let Some(address) = address.filter(|address| !subnet.contains(address)) {
                return Err(RangeError::Outside {
                    key,
                    address,
                    subnet,
                });
            }
        }
        let first = with_bits(subnet.network(), bits(subnet.network()) + 1);
        let last = match subnet {
            IpNet::V4(_) => with_bits(subnet.network(), bits(subnet.broadcast()) - 1),
            IpNet::V6(_) => subnet.broadcast(),
        };
        let range = Self {
            subnet,
            start: start.unwrap_or(first),
            end: end.unwrap_or(last),
            gateway: gateway.unwrap_or(first),
        };
        if range.end < range.start {
            return Err(RangeError::Reversed {
                start: range.start,
                end: range.end,
                subnet,
            });
        }
        // What `rangeStart` and `rangeEnd` name cannot be one, but a subnet's last can.
        if is_mapped(range.start) || is_mapped(range.end) {
            return Err(RangeError::Mapped(range.into()));
        }
        Ok(range)
    }

    /// The subnet that the range's addresses are on.
    #[must_use]
    pub fn subnet(&self) -> IpNet {
        self.subnet
    }

    /// The gateway of the subnet; it is never given out.
    #[must_use]
    pub fn gateway(&self) -> IpAddr {
        self.gateway
    }

    /// Whether the address lies between the range's ends.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        // `IpAddr` orders all of IPv4 before IPv6, so both ends decide the family too.
        self.start <= address && address <= self.end
    }

    /// The address with the prefix length of the subnet.
    pub(super) fn on_subnet(&self, address: IpAddr) -> IpNet {
        // An address of the range is of the subnet's family, so there is no other case.
        IpNet::new(address, self.subnet.prefix_len()).unwrap_or_else(|_| address.into())
    }

    /// What the address means on its subnet, if that keeps it from being an interface's.
    ///
    /// Only a range whose ends are configured so reaches these.
    pub(super) fn reserved(&self, address: IpAddr) -> Option<&'static str> {
        if address == self.gateway {
            Some("the gateway")
        } else if address == self.subnet.network() {
            Some(match address {
                IpAddr::V4(_) => "the network address",
                // RFC 4291 section 2.6.1
                IpAddr::V6(_) => "the subnet-router anycast address",
            })
        } else if address.is_ipv4() && address == self.subnet.broadcast() {
            Some("the broadcast address")
        } else {
            None
        }
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.start, self.end)
    }
}

/// A pool of one family from which an attachment gets one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeSet(Vec<Range>);

impl RangeSet {
    /// # Errors
    /// The set is empty, mixes families, or its ranges overlap.
    pub fn new(ranges: Vec<Range>) -> Result<Self, RangeError> {
        let first = ranges.first().ok_or(RangeError::Empty)?;
        for (index, range) in ranges.iter().enumerate() {
            if range.start.is_ipv4() != first.start.is_ipv4() {
                return Err(RangeError::MixedFamilies(
                    first.clone().into(),
                    range.clone().into(),
                ));
            }
            if let Some(before) = ranges[..index].iter().find(|before| before.overlaps(range)) {
                return Err(RangeError::Overlap(
                    before.clone().into(),
                    range.clone().into(),
                ));
            }
        }
        Ok(Self(ranges))
    }

    /// The ranges, in the order of the configuration.
    #[must_use]
    pub fn ranges(&self) -> &[Range] {
        &self.0
    }

    /// Whether the set is of IPv4 addresses.
    #[must_use]
    pub fn is_ipv4(&self) -> bool {
        self.0.iter().all(|range| range.start.is_ipv4())
    }

    /// The range that the address lies in.
    #[must_use]
    pub fn range_of(&self, address: IpAddr) -> Option<&Range> {
        self.0.iter().find(|range| range.contains(address))
    }

    pub(super) fn overlaps(&self, other: &Self) -> bool {
        self.0
            .iter()
            .any(|range| other.0.iter().any(|other| range.overlaps(other)))
    }

    /// Every address of the set once, beginning after `last`: a container that is
    /// restarted again and again sees an address again only when all were used.
    pub(super) fn round_robin(&self, last: Option<IpAddr>) -> RoundRobin<'_> {
        let at = last.and_then(|last| {
            let index = self.0.iter().position(|range| range.contains(last))?;
            Some((index, last))
        });
        let first = match at {
            Some(at) => self.after(at),
            None => (0, self.0[0].start),
        };
        RoundRobin {
            set: self,
            first,
            next: Some(first),
        }
    }

    fn after(&self, (index, address): (usize, IpAddr)) -> (usize, IpAddr) {
        if address == self.0[index].end {
            let index = (index + 1) % self.0.len();
            (index, self.0[index].start)
        } else {
            let next = with_bits(address, bits(address) + 1);
            // The range goes on behind them.
            let next = if is_mapped(next) {
                with_bits(next, MAPPED_END)
            } else {
                next
            };
            (index, next)
        }
    }
}

impl fmt::Display for RangeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, range) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            range.fmt(f)?;
        }
        Ok(())
    }
}

/// See [`RangeSet::round_robin`].
pub(super) struct RoundRobin<'a> {
    set: &'a RangeSet,
    first: (usize, IpAddr),
    next: Option<(usize, IpAddr)>,
}

impl<'a> Iterator for RoundRobin<'a> {
    type Item = (IpAddr, &'a Range);

    fn next(&mut self) -> Option<Self::Item> {
        let at = self.next?;
        let after = self.set.after(at);
        self.next = (after != self.first).then_some(after);
        Some((at.1, &self.set.0[at.0]))
    }
}

/// The first address behind `::ffff:0:0/96` (RFC 4291 §2.5.5.2), as bits.
const MAPPED_END: u128 = 1 << 48;

/// Whether it is an IPv4 address in IPv6's notation: an interface has it as the former.
fn is_mapped(address: IpAddr) -> bool {
    address.is_ipv6() && address.to_canonical().is_ipv4()
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// The address of these bits, of the same family as `like`.
fn with_bits(like: IpAddr, bits: u128) -> IpAddr {
    match like {
        // Never out of range: callers stay within a subnet.
        IpAddr::V4(_) => IpAddr::V4((bits as u32).into()),
        IpAddr::V6(_) => IpAddr::V6(bits.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn range(subnet: &str, start: &str, end: &str, gateway: &str) -> Result<Range, RangeError> {
        let optional = |text: &str| (!text.is_empty()).then(|| ip(text));
        Range::new(
            subnet.parse().unwrap(),
            optional(start),
            optional(end),
            optional(gateway),
        )
    }

    fn order(set: &RangeSet, last: &str) -> Vec<String> {
        let last = (!last.is_empty()).then(|| ip(last));
        set.round_robin(last)
            .map(|(address, _)| address.to_string())
            .collect()
    }

    #[test]
    fn defaults() {
        for (subnet, start, end, gateway) in [
            ("192.0.2.0/24", "192.0.2.1", "192.0.2.254", "192.0.2.1"),
            ("192.0.2.0/25", "192.0.2.1", "192.0.2.126", "192.0.2.1"),
            ("192.0.2.12/30", "192.0.2.13", "192.0.2.14", "192.0.2.13"),
            ("0.0.0.0/0", "0.0.0.1", "255.255.255.254", "0.0.0.1"),
            (
                "2001:db8:1::/64",
                "2001:db8:1::1",
                "2001:db8:1::ffff:ffff:ffff:ffff",
                "2001:db8:1::1",
            ),
            (
                "::/0",
                "::1",
                "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
                "::1",
            ),
        ] {
            let range = range(subnet, "", "", "").unwrap();
            assert_eq!((range.start, range.end), (ip(start), ip(end)), "{subnet}");
            assert_eq!(range.gateway, ip(gateway), "{subnet}");
        }
    }

    #[test]
    fn refuses_bad_ranges() {
        for (subnet, start, end, gateway, message) in [
            (
                "192.0.2.0/31",
                "",
                "",
                "",
                "network 192.0.2.0/31 is too small",
            ),
            ("192.0.2.0/32", "", "", "", "too small"),
            ("2001:db8::/127", "", "", "", "too small"),
            (
                "192.0.2.5/24",
                "",
                "",
                "",
                "has host bits set: for a prefix length of 24 the network address is 192.0.2.0",
            ),
            (
                "192.0.2.0/24",
                "",
                "",
                "192.0.3.1",
                "gateway 192.0.3.1 is not in network 192.0.2.0/24",
            ),
            (
                "192.0.2.0/24",
                "192.0.3.1",
                "",
                "",
                "rangeStart 192.0.3.1 is not in",
            ),
            (
                "192.0.2.0/24",
                "",
                "192.0.3.1",
                "",
                "rangeEnd 192.0.3.1 is not in",
            ),
            (
                "192.0.2.0/24",
                "2001:db8::1",
                "",
                "",
                "rangeStart 2001:db8::1 is not in",
            ),
            (
                "192.0.2.0/24",
                "192.0.2.50",
                "192.0.2.40",
                "",
                "before rangeStart 192.0.2.50",
            ),
            ("192.0.2.0/24", "192.0.2.255", "", "", "before rangeStart"),
            ("192.0.2.0/24", "", "192.0.2.0", "", "before rangeStart"),
        ] {
            let error = range(subnet, start, end, gateway).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn refuses_bad_sets() {
        let make = |ranges: &[(&str, &str, &str)]| {
            let ranges = ranges
                .iter()
                .map(|(net, start, end)| range(net, start, end, "").unwrap());
            RangeSet::new(ranges.collect())
        };
        assert_eq!(RangeSet::new(vec![]), Err(RangeError::Empty));
        let mixed = make(&[("192.0.2.0/24", "", ""), ("2001:db8::/64", "", "")]).unwrap_err();
        assert!(
            mixed.to_string().starts_with("mixed address families"),
            "{mixed}"
        );
        let overlap = make(&[("192.0.2.0/24", "", ""), ("192.0.2.128/25", "", "")]).unwrap_err();
        assert_eq!(
            overlap.to_string(),
            "subnets 192.0.2.1-192.0.2.254 and 192.0.2.129-192.0.2.254 overlap"
        );
        // One subnet, two parts of it.
        let parts = [
            ("192.0.2.0/24", "", "192.0.2.9"),
            ("192.0.2.0/24", "192.0.2.10", ""),
        ];
        assert_eq!(
            make(&parts).unwrap().to_string(),
            "192.0.2.1-192.0.2.9,192.0.2.10-192.0.2.254"
        );
    }

    #[test]
    fn goes_round() {
        let small = RangeSet::new(vec![range("192.0.2.0/29", "", "", "").unwrap()]).unwrap();
        let all = order(&small, "");
        assert_eq!(all.len(), 6);
        assert_eq!((&*all[0], &*all[5]), ("192.0.2.1", "192.0.2.6"));
        assert_eq!(order(&small, "192.0.2.3")[..2], ["192.0.2.4", "192.0.2.5"]);
        assert_eq!(order(&small, "192.0.2.3").last().unwrap(), "192.0.2.3");
        assert_eq!(order(&small, "192.0.2.6"), all);
        assert_eq!(
            order(&small, "10.0.0.1"),
            all,
            "a last address of another configuration"
        );

        let two = RangeSet::new(vec![
            range("192.0.2.0/30", "", "", "").unwrap(),
            range("198.51.100.0/29", "198.51.100.2", "198.51.100.2", "").unwrap(),
        ])
        .unwrap();
        assert_eq!(
            order(&two, "192.0.2.2"),
            ["198.51.100.2", "192.0.2.1", "192.0.2.2"]
        );
        assert_eq!(
            order(&two, "198.51.100.2"),
            ["192.0.2.1", "192.0.2.2", "198.51.100.2"]
        );
        let single = RangeSet::new(vec![two.0[1].clone()]).unwrap();
        assert_eq!(order(&single, "198.51.100.2"), ["198.51.100.2"]);
    }

    #[test]
    fn the_largest_range_does_not_overflow() {
        let top = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
        let all = RangeSet::new(vec![range("::/0", "::", top, "").unwrap()]).unwrap();
        let next: Vec<_> = all
            .round_robin(Some(ip(top)))
            .map(|it| it.0)
            .take(2)
            .collect();
        assert_eq!(next, [ip("::"), ip("::1")]);
        let all = RangeSet::new(vec![
            range("0.0.0.0/0", "0.0.0.0", "255.255.255.255", "").unwrap(),
        ])
        .unwrap();
        let next = all
            .round_robin(Some(ip("255.255.255.255")))
            .next()
            .unwrap()
            .0;
        assert_eq!(next, ip("0.0.0.0"));
    }

    #[test]
    fn ipv4_addresses_in_ipv6_notation_are_passed_over() {
        let all = RangeSet::new(vec![range("::/64", "", "", "").unwrap()]).unwrap();
        let last = Some(ip("::fffe:ffff:fffe"));
        let next: Vec<_> = all.round_robin(last).map(|it| it.0).take(2).collect();
        assert_eq!(next, [ip("::fffe:ffff:ffff"), ip("::1:0:0:0")]);
        let error = range("::fffe:0:0/95", "", "", "").unwrap_err();
        assert!(error.to_string().contains("IPv4 addresses"), "{error}");
    }

    #[test]
    fn reserved_addresses() {
        let range = range("192.0.2.0/24", "192.0.2.0", "192.0.2.255", "192.0.2.9").unwrap();
        for (address, reserved) in [
            ("192.0.2.0", Some("the network address")),
            ("192.0.2.9", Some("the gateway")),
            ("192.0.2.255", Some("the broadcast address")),
            ("192.0.2.1", None),
        ] {
            assert_eq!(range.reserved(ip(address)), reserved, "{address}");
        }
    }
}
