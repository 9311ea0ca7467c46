//! Addresses of one device.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};

use super::{LinkError, Netlink};

/// An address of a device, as the kernel describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address with the length of its prefix.
    pub net: IpNet,
    /// Whether it cannot be used yet, because duplicate address detection is
    /// still running (IPv6).
    pub tentative: bool,
    /// Whether duplicate address detection found another owner (IPv6).
    pub duplicate: bool,
    /// Whether it is valid on this link only (scope link: `fe80::/10`).
    pub link_local: bool,
}

impl Netlink {
    /// Adds an address, with the route to its prefix that the kernel makes.
    ///
    /// An IPv6 address is used at once; with `dad`, after duplicate address
    /// detection, as the device's `accept_dad` says. IPv4 knows no such thing.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`], with `EEXIST` if the device has the address.
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
            format!("add address {address} to interface {index}")
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
            || format!("delete address {address} from interface {index}"),
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
            format!("list the addresses of interface {index}")
        }) {
            Ok(found) => found,
            Err(error) if error.is_missing() => Vec::new(),
            Err(error) => return Err(error),
        };
        Ok(found
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewAddress(message) if message.header.index == index => {
                    describe(&message)
                }
                _ => None,
            })
            .collect())
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
        net: IpNet::new(address, message.header.prefix_len).ok()?,
        tentative: flags.contains(AddressFlags::Tentative),
        duplicate: flags.contains(AddressFlags::Dadfailed),
        link_local: message.header.scope == AddressScope::Link,
    })
}
