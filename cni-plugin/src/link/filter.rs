//! Packet filters of a device (`tc filter`): whether a BPF classifier is where
//! it was put.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
};

use super::{LinkError, Netlink};

/// Where a device's classifiers run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// On what it receives.
    Ingress,
    /// On what it sends.
    Egress,
}

impl Hook {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// Its place in a clsact qdisc.
    const fn parent(self) -> TcHandle {
        TcHandle {
            major: TcHandle::CLSACT.major,
            minor: match self {
                Self::Ingress => TcHandle::MIN_INGRESS,
                Self::Egress => TcHandle::MIN_EGRESS,
            },
        }
    }
}

/// `ETH_P_ALL` of `linux/if_ether.h`.
const EVERY_PROTOCOL: u16 = 3;

impl Netlink {
    /// Gives device `index` a clsact qdisc: the place for classifiers that see what
    /// the device receives and sends.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`], with `EEXIST` if there is one, or an ingress qdisc.
    pub fn add_clsact(&self, index: u32) -> Result<(), LinkError> {
        let mut message = tc_message(index);
        message.header.parent = TcHandle::CLSACT;
        message.header.handle = TcHandle {
            major: TcHandle::CLSACT.major,
            minor: 0,
        };
        message
            .attributes
            .push(TcAttribute::Kind("clsact".to_owned()));
        self.request(
            RouteNetlinkMessage::NewQueueDiscipline(message),
            NLM_F_CREATE | NLM_F_EXCL,
            || format!("add a clsact qdisc to {}", self.interface(index)),
        )?;
        Ok(())
    }

    /// Lets a BPF program see, and decide about, what device `index` receives or
    /// sends. The device needs a [clsact](Self::add_clsact) qdisc. `name` is what `tc` shows.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`], with `EEXIST` if the place is taken.
    pub fn add_bpf(
        &self,
        index: u32,
        hook: Hook,
        pref: u16,
        handle: u32,
        program: BorrowedFd<'_>,
        name: &str,
    ) -> Result<(), LinkError> {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        self.set_bpf(index, (hook, pref, handle), program, name, flags)
    }

    /// Puts a BPF program in the place of one that [`Self::add_bpf`] has put there: each
    /// packet meets the one or the other (`cls_bpf_change`).
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`], with `ENOENT` if there is none.
    pub fn replace_bpf(
        &self,
        index: u32,
        hook: Hook,
        pref: u16,
        handle: u32,
        program: BorrowedFd<'_>,
        name: &str,
    ) -> Result<(), LinkError> {
        self.set_bpf(index, (hook, pref, handle), program, name, NLM_F_REPLACE)
    }

    fn set_bpf(
        &self,
        index: u32,
        (hook, pref, handle): (Hook, u16, u32),
        program: BorrowedFd<'_>,
        name: &str,
        flags: u16,
    ) -> Result<(), LinkError> {
        let mut message = tc_message(index);
        message.header.parent = hook.parent();
        message.header.handle = handle.into();
        message.header.info = u32::from(pref) << 16 | u32::from(EVERY_PROTOCOL.to_be());
        message.attributes = vec![
            TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
            TcAttribute::Options(vec![
                // A descriptor is never negative.
                TcOption::Bpf(TcFilterBpfOption::ProgFd(
                    program.as_raw_fd().unsigned_abs(),
                )),
                TcOption::Bpf(TcFilterBpfOption::ProgName(name.to_owned())),
                TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
            ]),
        ];
        self.request(
            RouteNetlinkMessage::NewTrafficFilter(message),
            flags,
            || {
                format!(
                    "attach the classifier {name:?} to {}",
                    self.interface(index)
                )
            },
        )?;
        Ok(())
    }

    /// Takes a BPF program away again that [`Self::add_bpf`] has put there.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub fn delete_bpf(
        &self,
        index: u32,
        hook: Hook,
        pref: u16,
        handle: u32,
    ) -> Result<(), LinkError> {
        let mut message = tc_message(index);
        message.header.parent = hook.parent();
        message.header.handle = handle.into();
        message.header.info = u32::from(pref) << 16 | u32::from(EVERY_PROTOCOL.to_be());
        message
            .attributes
            .push(TcAttribute::Kind(TcFilterBpf::KIND.to_owned()));
        self.request(RouteNetlinkMessage::DelTrafficFilter(message), 0, || {
            format!("detach a classifier from {}", self.interface(index))
        })?;
        Ok(())
    }

    /// The id of the BPF program that the classifier of priority `pref` and
    /// handle `handle` at a clsact hook of device `index` runs. `None` if
    /// there is no such device, no clsact, or no BPF classifier in that place.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub fn tc_bpf(
        &self,
        index: u32,
        hook: Hook,
        pref: u16,
        handle: u32,
    ) -> Result<Option<u32>, LinkError> {
        let operation = || {
            let interface = self.interface(index);
            format!("look up classifier {handle:#x} of priority {pref} on {interface}")
        };
        let Ok(tc_index) = i32::try_from(index) else {
            return Ok(None);
        };
        let mut query = TcMessage::with_index(tc_index);
        query.header.parent = hook.parent();
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

fn tc_message(index: u32) -> TcMessage {
    // An index is a positive int inside the kernel.
    TcMessage::with_index(index.cast_signed())
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        os::fd::{AsFd as _, AsRawFd, FromRawFd, OwnedFd},
    };

    use nix::libc;

    use super::*;
    use crate::link::testing::Pair;

    const PREF: u16 = 7;
    const HANDLE: u32 = 0xb1d6e;

    /// The smallest classifier: `return 0`.
    fn program() -> OwnedFd {
        #[repr(C)]
        #[derive(Default)]
        struct Load {
            kind: u32,
            instructions: u32,
            code: u64,
            license: u64,
            rest: [u64; 13],
        }
        const BPF_PROG_LOAD: libc::c_int = 5;
        const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
        // r0 = 0; exit
        let code: [u64; 2] = [0xb7, 0x95];
        let attributes = Load {
            kind: BPF_PROG_TYPE_SCHED_CLS,
            instructions: 2,
            code: code.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            ..Load::default()
        };
        // SAFETY: what the attributes point to outlives the call, and the rest
        // of them is zero.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_PROG_LOAD,
                &raw const attributes,
                size_of::<Load>(),
            )
        };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: a new descriptor that nobody else has.
        unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap()) }
    }

    /// The program's id, as the descriptor's fdinfo tells it.
    fn id_of(program: &OwnedFd) -> u32 {
        std::fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", program.as_raw_fd()))
            .unwrap()
            .lines()
            .find_map(|line| line.strip_prefix("prog_id:"))
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    }

    #[test]
    fn finds_the_program_in_its_place_only() {
        let pair = Pair::new();
        let (netlink, index) = (&pair.outside, pair.made.host);
        let at = |hook, pref, handle| netlink.tc_bpf(index, hook, pref, handle).unwrap();
        let found = |pref, handle| at(Hook::Ingress, pref, handle);
        let add = |hook, program: &OwnedFd| {
            netlink
                .add_bpf(index, hook, PREF, HANDLE, program.as_fd(), "test")
                .unwrap();
        };
        assert_eq!(found(PREF, HANDLE), None, "without clsact");
        netlink.add_clsact(index).unwrap();
        assert_eq!(found(PREF, HANDLE), None, "with clsact alone");
        let program = program();
        let other = self::program();
        add(Hook::Egress, &other);
        assert_eq!(found(PREF, HANDLE), None, "with one at egress");
        add(Hook::Ingress, &program);
        assert_eq!(found(PREF, HANDLE), Some(id_of(&program)));
        assert_eq!(found(PREF, HANDLE + 1), None, "another handle");
        assert_eq!(found(PREF + 1, HANDLE), None, "another priority");
        assert_eq!(at(Hook::Egress, PREF, HANDLE), Some(id_of(&other)));
        netlink
            .replace_bpf(index, Hook::Ingress, PREF, HANDLE, other.as_fd(), "other")
            .unwrap();
        assert_eq!(found(PREF, HANDLE), Some(id_of(&other)), "replaced");
        netlink
            .replace_bpf(
                index,
                Hook::Ingress,
                PREF,
                HANDLE + 1,
                other.as_fd(),
                "none",
            )
            .unwrap_err();
        netlink
            .delete_bpf(index, Hook::Ingress, PREF, HANDLE)
            .unwrap();
        assert_eq!(found(PREF, HANDLE), None, "detached");
        assert_eq!(at(Hook::Egress, PREF, HANDLE), Some(id_of(&other)));
    }

    #[test]
    fn a_missing_device_has_no_classifier() {
        let pair = Pair::new();
        for index in [99_999, u32::MAX] {
            assert_eq!(
                pair.outside
                    .tc_bpf(index, Hook::Ingress, PREF, HANDLE)
                    .unwrap(),
                None
            );
        }
    }
}
