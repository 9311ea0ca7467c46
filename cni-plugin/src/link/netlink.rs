//! The rtnetlink connection and its errors.

use std::{
    fmt, io,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use netlink_packet_route::RouteNetlinkMessage;
use nix::libc;
use rtnetlink::packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer,
    NetlinkMessage, NetlinkPayload, NlasIterator,
};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use thiserror::Error;

use super::device;
use crate::{
    fault,
    netns::{Netns, NetnsError},
};

/// How long a dump that the kernel calls inconsistent is asked for again. On a node where
/// others change things all the time each one may be, and the next one not.
const DUMP_PATIENCE: Duration = Duration::from_secs(2);
/// How long a datagram of the kernel's may be, in bytes: twice as long as it makes those of
/// a dump.
const DATAGRAM_MAX: usize = 64 * 1024;

/// What failed on an rtnetlink connection.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The connection could not be opened.
    #[error("cannot open an rtnetlink socket: {0}")]
    Open(#[source] io::Error),
    /// The namespace that the socket belongs in could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The kernel refused a request.
    #[error("cannot {operation}: {source}{}", Detail(detail))]
    Refused {
        /// What was being done and to which device, as in "add address
        /// 10.1.0.2/16 to eth0".
        operation: String,
        /// The kernel's error number.
        source: io::Error,
        /// The kernel's own words (extended acknowledgement), if it had any.
        detail: String,
    },
    /// A device of this name is there already.
    #[error("interface {name} already exists {}", if *in_sandbox { "in the sandbox" } else { "on the host" })]
    Exists {
        /// The device's name.
        name: String,
        /// Whether it is in the namespace of the peer, not in that of the
        /// connection.
        in_sandbox: bool,
    },
    /// The kernel's answer is not what it must be, or there was none.
    #[error("cannot {operation}: {problem}")]
    Protocol {
        /// What was being done.
        operation: String,
        /// What is wrong with the answer.
        problem: &'static str,
    },
}

struct Detail<'a>(&'a str);

impl fmt::Display for Detail<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            Ok(())
        } else {
            write!(f, ": {}", self.0)
        }
    }
}

impl LinkError {
    /// The kernel's error number, if the kernel refused the request.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// Whether the kernel knows no such device, address or route.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        // ENODEV for devices, EADDRNOTAVAIL for addresses, ESRCH for routes.
        matches!(self.errno(), Some(code) if code == libc::ENODEV
            || code == libc::EADDRNOTAVAIL
            || code == libc::ESRCH)
    }
}

/// Asks again and again, less and less often, until the answer is yes or `limit`
/// is over.
pub(super) fn poll(
    limit: Duration,
    mut ask: impl FnMut() -> Result<bool, LinkError>,
) -> Result<bool, LinkError> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_micros(50);
    loop {
        if ask()? {
            return Ok(true);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        thread::sleep(pause.min(left));
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

/// A connection to the rtnetlink of one network namespace.
///
/// It stays in the namespace it was opened in, whatever the calling thread does
/// later. Methods block until the kernel has answered.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    exchange: Mutex<Exchange>,
}

/// What one request after the other uses. The kernel answers in the call that asks, so
/// nothing else need be done meanwhile.
#[derive(Debug)]
struct Exchange {
    number: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Connects to the calling thread's namespace.
    ///
    /// # Errors
    ///
    /// [`LinkError::Open`].
    pub fn host() -> Result<Self, LinkError> {
        let socket = socket().map_err(LinkError::Open)?;
        Ok(Self {
            socket,
            exchange: Mutex::new(Exchange {
                number: 0,
                buffer: Vec::with_capacity(DATAGRAM_MAX),
            }),
        })
    }

    /// Connects to `netns`.
    ///
    /// # Errors
    ///
    /// [`LinkError::Open`] and [`LinkError::Netns`].
    pub fn open(netns: &Netns) -> Result<Self, LinkError> {
        // A socket belongs to the namespace of the thread that makes it.
        netns.run_in(Self::host)?
    }

    /// Sends one request and waits for its acknowledgement. Returns what the
    /// kernel sent before it. `operation` goes into the error.
    pub(super) fn request(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        operation: impl Fn() -> String,
    ) -> Result<Vec<RouteNetlinkMessage>, LinkError> {
        // What only asks is answered, or refused, without one as well.
        let acknowledged = if Kind(message.message_type()).is_change() {
            NLM_F_ACK
        } else {
            0
        };
        self.exchange(message, flags | acknowledged, &operation)
            .map(|answer| answer.messages)
    }

    /// Sends one dump request and waits for the whole answer, asking again while
    /// the kernel says that it changed underneath.
    pub(super) fn dump(
        &self,
        message: &RouteNetlinkMessage,
        operation: impl Fn() -> String,
    ) -> Result<Vec<RouteNetlinkMessage>, LinkError> {
        let end = Instant::now() + DUMP_PATIENCE;
        while Instant::now() < end {
            match self.exchange(message.clone(), NLM_F_DUMP, &operation) {
                Ok(answer) if answer.interrupted => {}
                Ok(answer) => return Ok(answer.messages),
                Err(error) if error.errno() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        Err(LinkError::Protocol {
            operation: operation(),
            problem: "for two seconds each answer of the kernel was interrupted by changes",
        })
    }

    fn exchange(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        operation: &impl Fn() -> String,
    ) -> Result<Answer, LinkError> {
        let kind = Kind(message.message_type());
        fault::request(fault::Kind::Netlink, kind).map_err(|source| LinkError::Refused {
            operation: operation(),
            source,
            detail: String::new(),
        })?;
        // The operation is put into words only here, where the connection is free again:
        // wording it may take a request of its own.
        let answer = self
            .answer(message, flags)
            .map_err(|failure| match failure {
                Failure::Refused { source, detail } => LinkError::Refused {
                    operation: operation(),
                    source,
                    detail,
                },
                Failure::Protocol(problem) => LinkError::Protocol {
                    operation: operation(),
                    problem,
                },
            })?;
        if kind.is_change() {
            fault::point(kind);
        }
        Ok(answer)
    }

    /// Sends a request, and reads all of the answer.
    fn answer(&self, message: RouteNetlinkMessage, flags: u16) -> Result<Answer, Failure> {
        let mut exchange = self.exchange.lock().unwrap_or_else(PoisonError::into_inner);
        let Exchange { number, buffer } = &mut *exchange;
        *number = number.wrapping_add(1);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = *number;
        request.finalize();
        buffer.clear();
        buffer.resize(request.buffer_len(), 0);
        request.serialize(buffer);
        uninterrupted(|| self.socket.send(buffer, 0))?;

        let mut answer = Answer::default();
        loop {
            buffer.clear();
            buffer.reserve(DATAGRAM_MAX);
            // The length that it has, even if there is no room for it.
            let length = uninterrupted(|| self.socket.recv(buffer, libc::MSG_TRUNC))?;
            if length > buffer.len() {
                return Err(Failure::Protocol("the kernel's answer is too long"));
            }
            if answer.take(buffer, *number, flags)? {
                return Ok(answer);
            }
        }
    }

    /// How a device is called in an error: by its name, while it has one.
    pub(super) fn interface(&self, index: u32) -> String {
        match self.link_by_index(index) {
            Ok(Some(link)) => format!("interface {}", link.name),
            Ok(None) | Err(_) => format!("interface number {index}"),
        }
    }
}

/// What is asked for: an `RTM_*` of `linux/rtnetlink.h`.
#[derive(Clone, Copy)]
struct Kind(u16);

impl Kind {
    /// Of each four, the third only asks.
    const fn is_change(self) -> bool {
        self.0 % 4 != 2
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = ["new", "delete", "get", "set"][usize::from(self.0 % 4)];
        match self.0 / 4 {
            4 => write!(f, "{verb} link"),
            5 => write!(f, "{verb} address"),
            6 => write!(f, "{verb} route"),
            9 => write!(f, "{verb} qdisc"),
            11 => write!(f, "{verb} filter"),
            _ => write!(f, "netlink message {}", self.0),
        }
    }
}

/// Why an exchange failed, before it is known what it was for.
enum Failure {
    Refused { source: io::Error, detail: String },
    Protocol(&'static str),
}

impl From<io::Error> for Failure {
    fn from(source: io::Error) -> Self {
        Self::Refused {
            source,
            detail: String::new(),
        }
    }
}

/// Repeats a system call that a signal interrupts.
fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

fn socket() -> io::Result<Socket> {
    let socket = Socket::new(NETLINK_ROUTE)?;
    // From now on nobody but the kernel can send to it.
    socket.connect(&SocketAddr::new(0, 0))?;
    // Strict checking is what makes the kernel filter a dump.
    socket.set_netlink_get_strict_chk(true)?;
    // Reasons in words, and no echo of the request before them. Neither is
    // needed to work (Linux 4.12 and 4.3 have them).
    let _ = socket.set_ext_ack(true);
    let _ = socket.set_cap_ack(true);
    Ok(socket)
}

#[derive(Default)]
struct Answer {
    messages: Vec<RouteNetlinkMessage>,
    interrupted: bool,
}

impl Answer {
    /// Adds what a datagram has of the answer to request `number`; says whether that was
    /// all of it.
    fn take(&mut self, datagram: &[u8], number: u32, flags: u16) -> Result<bool, Failure> {
        const INCOMPLETE: Failure = Failure::Protocol("the kernel's answer is cut off");
        let ends_with_message = flags & (NLM_F_ACK | NLM_F_DUMP) == 0;
        let mut rest = datagram;
        while !rest.is_empty() {
            let header = NetlinkBuffer::new_checked(rest).map_err(|_| INCOMPLETE)?;
            let length = header.length() as usize;
            let (message, behind) = rest.split_at_checked(length).ok_or(INCOMPLETE)?;
            rest = behind
                .get(length.next_multiple_of(4) - length..)
                .unwrap_or_default();
            // The rest of an answer that was given up.
            if header.sequence_number() != number {
                continue;
            }
            self.interrupted |= header.flags() & NLM_F_DUMP_INTR != 0;
            let parsed = if header.message_type() == libc::RTM_NEWLINK {
                device::parse(header.payload())
                    .map(|link| NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)))
            } else {
                NetlinkMessage::deserialize(message).map(|message| message.payload)
            };
            let payload = match parsed {
                Ok(payload) => payload,
                // Nothing else would follow.
                Err(_) if ends_with_message => {
                    return Err(Failure::Protocol("the kernel's answer is not understood"));
                }
                Err(_) => continue,
            };
            match payload {
                NetlinkPayload::InnerMessage(message) => {
                    self.messages.push(message);
                    if ends_with_message {
                        return Ok(true);
                    }
                }
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(Failure::Refused {
                        source: error.to_io(),
                        detail: detail(&error),
                    });
                }
                // A dump that fails halfway says so at its end.
                NetlinkPayload::Done(done) if done.code != 0 => {
                    return Err(io::Error::from_raw_os_error(done.code.saturating_abs()).into());
                }
                NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(true),
                _ => {}
            }
        }
        Ok(false)
    }
}

/// `NLMSGERR_ATTR_MSG` of the kernel's `include/uapi/linux/netlink.h`.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// The words of an extended acknowledgement, empty if there are none.
fn detail(error: &ErrorMessage) -> String {
    // A capped acknowledgement repeats the request's header and nothing of its
    // body; the attributes stand behind it.
    const HEADER: usize = 16;
    let Some(attributes) = error.header.get(HEADER..) else {
        return String::new();
    };
    NlasIterator::new(attributes)
        .map_while(Result::ok)
        .find(|attribute| attribute.kind() == NLMSGERR_ATTR_MSG)
        .map(|attribute| {
            String::from_utf8_lossy(attribute.value())
                .trim_end_matches(['\0', '.'])
                .to_owned()
        })
        .unwrap_or_default()
}
