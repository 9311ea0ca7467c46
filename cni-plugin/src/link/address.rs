//! Addresses of devices.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
};

use super::{LinkError, Netlink};

/// An address of a device, as the kernel describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// Index of the device.
    pub ifindex: u32,
    /// The address with the length of its prefix; on a point-to-point link the
    /// prefix is the other side's.
    pub net: IpNet,
    /// Whether it cannot be used yet, because duplicate address detection is
    /// still running (IPv6).
    pub tentative: bool,
    /// Whether duplicate address detection found another owner (IPv6).
    pub duplicate: bool,
    /// Whether it is valid on this link only (scope link: `fe80::/10`).
    pub link_local: bool,
    /// Whether the kernel may choose it as the source of a packet to anywhere: it is
    /// global, and neither secondary, temporary nor deprecated, nor unusable.
    pub eligible: bool,
}

impl Netlink {
    /// Adds an address, with the route to its prefix that the kernel makes.
    ///
    /// An IPv6 address is used at once; with `dad`, after duplicate address
    /// detection, as the device's `accept_dad` says. IPv4 knows no such thing.
    ///
    /// Given to a device that is still down, its own
    /// [link-local address](crate::mac::MacAddr::link_local) is ready the moment it
    /// comes up; the one that the kernel would make then is tentative until a
    /// work queue has run, even with `accept_dad` 0.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`], with `EEXIST` if the device has the address and
    /// `EACCES` if its `disable_ipv6` is set.
    pub fn add_address(&self, index: u32, address: IpNet, dad: bool) -> Result<(), LinkError> {
        self.new_address(index, address, dad, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Adds an address, or makes the one that is there what is asked for.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub fn replace_address(&self, index: u32, address: IpNet, dad: bool) -> Result<(), LinkError> {
        self.new_address(index, address, dad, NLM_F_CREATE | NLM_F_REPLACE)
    }

    fn new_address(
        &self,
        index: u32,
        address: IpNet,
        dad: bool,
        flags: u16,
    ) -> Result<(), LinkError> {
        let mut message = message(index, address);
        match address {
            IpNet::V4(net) => {
                // As `ip address add … broadcast +`; a /31 and a /32 have none.
                if net.prefix_len() < 31 {
                    message
                        .attributes
                        .push(AddressAttribute::Broadcast(net.broadcast()));
                }
            }
            IpNet::V6(_) => {
                if !dad {
                    message
                        .attributes
                        .push(AddressAttribute::Flags(AddressFlags::Nodad));
                }
            }
        }
        self.request(RouteNetlinkMessage::NewAddress(message), flags, || {
            format!("add address {address} to {}", self.interface(index))
        })?;
        Ok(())
    }

    /// Takes an address from a device. `false` if the device did not have it.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub fn delete_address(&self, index: u32, address: IpNet) -> Result<bool, LinkError> {
        match self.request(
            RouteNetlinkMessage::DelAddress(message(index, address)),
            0,
            || format!("delete address {address} from {}", self.interface(index)),
        ) {
            Ok(_) => Ok(true),
            Err(error) if error.is_missing() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The addresses of one device, of both families. One dump, of this device
    /// only; none for a device that does not exist.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub fn addresses(&self, index: u32) -> Result<Vec<Address>, LinkError> {
        let mut query = AddressMessage::default();
        query.header.index = index;
        let found = match self.dump(&RouteNetlinkMessage::GetAddress(query), || {
            format!("list the addresses of {}", self.interface(index))
        }) {
            Ok(found) => found,
            Err(error) if error.is_missing() => Vec::new(),
            Err(error) => return Err(error),
        };
        Ok(describe_all(found)
            .filter(|address| address.ifindex == index)
            .collect())
    }

    /// The addresses of all devices, of both families. One dump, as long as the
    /// list that it answers with: ports have no addresses.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub fn all_addresses(&self) -> Result<Vec<Address>, LinkError> {
        let query = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let found = self.dump(&query, || "list all addresses".to_owned())?;
        Ok(describe_all(found).collect())
    }
}

fn message(index: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    let header = &mut message.header;
    header.index = index;
    header.prefix_len = address.prefix_len();
    header.family = match address {
        IpNet::V4(_) => AddressFamily::Inet,
        IpNet::V6(_) => AddressFamily::Inet6,
    };
    message.attributes = vec![
        AddressAttribute::Local(address.addr()),
        AddressAttribute::Address(address.addr()),
    ];
    message
}

fn describe_all(messages: Vec<RouteNetlinkMessage>) -> impl Iterator<Item = Address> {
    messages.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewAddress(message) => describe(&message),
        _ => None,
    })
}

fn describe(message: &AddressMessage) -> Option<Address> {
    let mut address = None;
    let mut local = None;
    let mut flags = AddressFlags::empty();
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(found) => address = Some(*found),
            AddressAttribute::Local(found) => local = Some(*found),
            AddressAttribute::Flags(found) => flags = *found,
            _ => {}
        }
    }
    // IFA_ADDRESS is the other side's on a point-to-point link; IPv6 has
    // IFA_LOCAL on such links only.
    let address: IpAddr = local.or(address)?;
    Some(Address {
        ifindex: message.header.index,
        net: IpNet::new(address, message.header.prefix_len).ok()?,
        tentative: flags.contains(AddressFlags::Tentative),
        duplicate: flags.contains(AddressFlags::Dadfailed),
        link_local: message.header.scope == AddressScope::Link,
        eligible: message.header.scope == AddressScope::Universe
            && !flags.intersects(
                // `IFA_F_TEMPORARY` of IPv6 is `IFA_F_SECONDARY` of IPv4.
                AddressFlags::Secondary
                    | AddressFlags::Deprecated
                    | AddressFlags::Tentative
                    | AddressFlags::Dadfailed,
            ),
    })
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashSet,
        fs,
        net::UdpSocket,
        sync::atomic::{AtomicBool, Ordering},
        thread,
        time::Duration,
    };

    use super::*;
    use crate::{
        link::{
            VethSpec,
            testing::{self, Pair},
        },
        mac::MacAddr,
        netns::Netns,
    };

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    /// Whether an address can be bound to: the kernel refuses a tentative one.
    fn usable(netns: &Netns, address: IpAddr) -> bool {
        netns
            .run_in(|| UdpSocket::bind((address, 0)).is_ok())
            .unwrap()
    }

    #[test]
    fn addresses_of_both_families_work_at_once() {
        let pair = Pair::new();
        pair.up();
        let (four, six) = (net("10.1.2.3/16"), net("fd00:1::3/64"));
        let inside = &pair.inside;
        inside.add_address(pair.made.peer, four, false).unwrap();
        inside.add_address(pair.made.peer, six, false).unwrap();
        assert!(usable(&pair.sandbox, four.addr()));
        assert!(usable(&pair.sandbox, six.addr()));

        let found = inside.addresses(pair.made.peer).unwrap();
        for wanted in [four, six] {
            let address = found.iter().find(|address| address.net == wanted).unwrap();
            assert!(!address.tentative && !address.duplicate && !address.link_local);
        }
        let listed = pair
            .sandbox
            .run_in(|| fs::read_to_string("/proc/thread-self/net/if_inet6"))
            .unwrap()
            .unwrap();
        // The fifth column is the flags: permanent (0x80), no DAD (0x02).
        let line = listed
            .lines()
            .find(|line| line.starts_with("fd000001000000000000000000000003"))
            .unwrap();
        assert_eq!(line.split_whitespace().nth(2), Some("40"), "{line}");
        assert_eq!(line.split_whitespace().nth(4), Some("82"), "{line}");
    }

    #[test]
    fn only_the_first_global_address_that_lasts_is_eligible() {
        let pair = Pair::new();
        let inside = &pair.inside;
        let all = ["10.1.2.3/16", "10.1.2.4/16", "fd00:1::3/64", "fe80::5/64"];
        for address in all {
            inside
                .add_address(pair.made.peer, net(address), false)
                .unwrap();
        }
        pair.up();
        let eligible: Vec<_> = inside
            .addresses(pair.made.peer)
            .unwrap()
            .into_iter()
            .filter(|address| address.eligible)
            .map(|address| address.net)
            .collect();
        assert_eq!(eligible, [net("10.1.2.3/16"), net("fd00:1::3/64")]);
    }

    #[test]
    fn duplicate_address_detection_is_left_on_where_it_is_wanted() {
        let pair = Pair::new();
        pair.up();
        let six = net("fd00:1::3/64");
        pair.inside.add_address(pair.made.peer, six, true).unwrap();
        let found = pair.inside.addresses(pair.made.peer).unwrap();
        assert!(
            found
                .iter()
                .any(|address| address.net == six && address.tentative)
        );
        assert!(!usable(&pair.sandbox, six.addr()));
    }

    #[test]
    fn a_link_local_address_given_before_the_device_is_up_works_at_once() {
        let pair = Pair::new();
        let peer = pair.made.peer;
        let mac = pair
            .inside
            .link_by_index(peer)
            .unwrap()
            .unwrap()
            .mac
            .unwrap();
        let own = IpNet::new(mac.link_local().into(), 64).unwrap();
        pair.inside.add_address(peer, own, false).unwrap();
        pair.up();
        let found = pair.inside.addresses(peer).unwrap();
        let expected = Address {
            ifindex: peer,
            net: own,
            tentative: false,
            duplicate: false,
            link_local: true,
            eligible: false,
        };
        assert_eq!(found, [expected]);
        // The route to its prefix, which a device that is down cannot have.
        let route = super::super::Route::new(net("fe80::/64"), None);
        assert!(pair.inside.has_route(peer, &route).unwrap());
    }

    #[test]
    fn an_address_is_added_once_and_deleted_once() {
        let pair = Pair::new();
        let (netlink, peer) = (&pair.inside, pair.made.peer);
        for address in [net("10.1.2.3/16"), net("fd00:1::3/64")] {
            netlink.add_address(peer, address, false).unwrap();
            let error = netlink.add_address(peer, address, false).unwrap_err();
            assert_eq!(error.errno(), Some(nix::libc::EEXIST));
            assert!(error.to_string().contains(&address.to_string()), "{error}");
            netlink.replace_address(peer, address, false).unwrap();
            assert_eq!(netlink.addresses(peer).unwrap().len(), 1);
            assert!(netlink.delete_address(peer, address).unwrap());
            assert!(!netlink.delete_address(peer, address).unwrap());
            assert_eq!(netlink.addresses(peer).unwrap(), []);
        }
    }

    #[test]
    fn only_one_devices_addresses_are_listed() {
        let host = testing::netns();
        let netlink = Netlink::open(&host).unwrap();
        let made = netlink
            .create_veth(&VethSpec {
                name: "one",
                mac: Some(MacAddr::from_hash(0x5e_1234)),
                peer_name: "two",
                peer_mac: None,
                peer_netns: None,
                mtu: 0,
            })
            .unwrap();
        netlink
            .add_address(made.host, net("10.0.1.1/24"), false)
            .unwrap();
        netlink
            .add_address(made.peer, net("10.0.2.1/24"), false)
            .unwrap();
        netlink
            .add_address(made.peer, net("10.0.2.2/24"), false)
            .unwrap();
        let one: Vec<_> = netlink.addresses(made.host).unwrap();
        let two: Vec<_> = netlink.addresses(made.peer).unwrap();
        assert_eq!(
            one.iter().map(|a| a.net).collect::<Vec<_>>(),
            [net("10.0.1.1/24")]
        );
        assert_eq!(
            two.iter().map(|a| a.net).collect::<Vec<_>>(),
            [net("10.0.2.1/24"), net("10.0.2.2/24")]
        );
        assert_eq!(netlink.addresses(99_999).unwrap(), []);
    }

    #[test]
    fn all_devices_addresses_are_listed_as_their_own_sides() {
        let pair = Pair::new();
        let (netlink, eth0) = (&pair.inside, pair.made.peer);
        assert_eq!(netlink.all_addresses().unwrap(), []);
        netlink.set_up(1).unwrap();
        netlink
            .add_address(eth0, net("10.0.1.1/24"), false)
            .unwrap();
        netlink.add_address(eth0, net("fe80::5/64"), false).unwrap();
        for (own, other) in [
            ("10.0.2.1", net("10.0.2.2/32")),
            ("fd00:2::1", net("fd00:2::2/128")),
        ] {
            let mut message = message(eth0, other);
            message.attributes = vec![
                AddressAttribute::Local(own.parse().unwrap()),
                AddressAttribute::Address(other.addr()),
            ];
            let flags = NLM_F_CREATE | NLM_F_EXCL;
            netlink
                .request(RouteNetlinkMessage::NewAddress(message), flags, || {
                    format!("add {own} with peer {other}")
                })
                .unwrap();
        }
        let mut found: Vec<_> = netlink
            .all_addresses()
            .unwrap()
            .into_iter()
            .map(|address| (address.ifindex, address.net, address.link_local))
            .collect();
        found.sort();
        let mut expected = [
            (1, net("127.0.0.1/8"), false),
            (1, net("::1/128"), false),
            (eth0, net("10.0.1.1/24"), false),
            (eth0, net("10.0.2.1/32"), false),
            (eth0, net("fd00:2::1/128"), false),
            (eth0, net("fe80::5/64"), true),
        ];
        expected.sort();
        assert_eq!(found, expected);
    }

    #[test]
    fn more_addresses_than_one_answer_holds_are_listed_while_others_change() {
        let pair = Pair::new();
        let eth0 = pair.made.peer;
        let wanted: Vec<_> = (0..600_u16)
            .map(|n| net(&format!("10.{}.{}.1/32", n / 250, n % 250)))
            .collect();
        for &address in &wanted {
            pair.inside.add_address(eth0, address, false).unwrap();
        }
        let done = AtomicBool::new(false);
        let (inside, sandbox) = (&pair.inside, &pair.sandbox);
        let (missing, changed) = thread::scope(|scope| {
            let changer = scope.spawn(|| {
                let other = Netlink::open(sandbox).unwrap();
                let mut first = wanted.iter().cycle();
                let mut changed = 0;
                while !done.load(Ordering::Relaxed) {
                    // The head of the list becomes its end, a few times: what is
                    // listed from a position on misses as many.
                    for &address in first.by_ref().take(5) {
                        assert!(other.delete_address(eth0, address).unwrap());
                        other.add_address(eth0, address, false).unwrap();
                    }
                    changed += 1;
                    thread::sleep(Duration::from_millis(1));
                }
                changed
            });
            let list = |_| -> HashSet<_> {
                let found = inside.all_addresses().unwrap_or_default();
                found.into_iter().map(|address| address.net).collect()
            };
            let missing = (0..200).map(list).map(|found| {
                let missing = wanted.iter().filter(|address| !found.contains(address));
                missing.count()
            });
            let missing = missing.max();
            done.store(true, Ordering::Relaxed);
            (missing, changer.join().unwrap())
        });
        // One may be on its way.
        assert!(missing <= Some(1) && changed > 1, "{missing:?} {changed}");
    }
}
