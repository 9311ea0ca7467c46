//! Packet filters of a device (`tc filter`): whether a BPF classifier is where
//! it was put.

use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
};

use super::{LinkError, Netlink};

impl Netlink {
    /// The id of the BPF program that the classifier of priority `pref` and
    /// handle `handle` at the clsact ingress of device `index` runs. `None` if
    /// there is no such device, no clsact, or no BPF classifier in that place.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub fn tc_ingress_bpf(
        &self,
        index: u32,
        pref: u16,
        handle: u32,
    ) -> Result<Option<u32>, LinkError> {
        let operation =
            || format!("look up classifier {handle:#x} of priority {pref} on interface {index}");
        let Ok(tc_index) = i32::try_from(index) else {
            return Ok(None);
        };
        let mut query = TcMessage::with_index(tc_index);
        query.header.parent = TcHandle {
            major: TcHandle::CLSACT.major,
            minor: TcHandle::MIN_INGRESS,
        };
        query.header.handle = handle.into();
        // The protocol in the lower half is left 0, which is any.
        query.header.info = u32::from(pref) << 16;
        query.attributes.push(TcAttribute::Kind("bpf".to_owned()));
        let found = match self.request(RouteNetlinkMessage::GetTrafficFilter(query), 0, operation) {
            Ok(found) => found,
            Err(error)
                if error.is_missing()
                    // No such filter; no clsact, or a filter of another kind.
                    || matches!(error.errno(), Some(nix::libc::ENOENT | nix::libc::EINVAL)) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        Ok(found
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewTrafficFilter(message) => Some(message.attributes),
                _ => None,
            })
            .flatten()
            .filter_map(|attribute| match attribute {
                TcAttribute::Options(options) => Some(options),
                _ => None,
            })
            .flatten()
            .find_map(|option| match option {
                TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(id),
                _ => None,
            }))
    }
}
