//! Rules of masquerade in netfilter, through nfnetlink: one chain of a table of our own
//! for each list of subnets.

use std::{io, net::IpAddr};

use ipnet::IpNet;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    NetfilterSubsystem,
    nftables::{
        Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, Expressions, Hook, Immediate,
        InetHookNumber, Meta, MetaKey, NfTablesMessage, Operator, Payload, Register, RuleAttribute,
        RuleMessage, TableAttribute, TableMessage, Verdict, VerdictAttribute,
    },
    none::ControlMessage,
};
use nix::libc;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use thiserror::Error;

use crate::fault::{self, Kind};

/// The table, of the family `inet`.
pub const TABLE: &str = "bpf-bridge";
/// `NF_IP_PRI_NAT_SRC` of `linux/netfilter_ipv4.h`: where sources are translated.
const SRCNAT: u32 = 100;
/// `NF_ACCEPT` of `linux/netfilter.h`.
const ACCEPT: u32 = 1;
/// `NFT_PAYLOAD_NETWORK_HEADER` of `linux/netfilter/nf_tables.h`.
const NETWORK_HEADER: u32 = 1;
/// `NLM_F_NONREC` of `linux/netlink.h`: only what is empty.
const NLM_F_NONREC: u16 = 0x100;
/// Groups, for which stock's masquerade is not either.
const MULTICAST: [&str; 2] = ["224.0.0.0/4", "ff00::/8"];

/// A question or request about rules that failed.
#[derive(Debug, Error)]
#[error("cannot {operation}: {source}")]
pub struct NftError {
    operation: String,
    source: io::Error,
}

impl NftError {
    fn of(operation: impl FnOnce() -> String) -> impl FnOnce(io::Error) -> Self {
        move |source| Self {
            operation: operation(),
            source,
        }
    }
}

/// A chain of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Its name.
    pub name: String,
    /// How many rules it has.
    pub rules: u32,
}

/// How many rules masquerade these subnets.
pub fn rule_count(subnets: &[IpNet], exempt: &[IpNet]) -> u32 {
    let count = subnets.len() + exempt.len() + MULTICAST.len();
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// The chains of the table, of the calling thread's namespace.
///
/// # Errors
///
/// [`NftError`].
pub fn chains() -> Result<Vec<Chain>, NftError> {
    let query = NfTablesMessage::GetChain(ChainMessage { attributes: vec![] });
    let found = ask(query, NLM_F_DUMP)
        .map_err(NftError::of(|| "list the chains of netfilter".to_owned()))?;
    Ok(found.into_iter().filter_map(describe).collect())
}

/// One of them.
///
/// # Errors
///
/// [`NftError`].
pub fn chain(name: &str) -> Result<Option<Chain>, NftError> {
    let query = NfTablesMessage::GetChain(ChainMessage {
        attributes: vec![
            ChainAttribute::Table(TABLE.to_owned()),
            ChainAttribute::Name(name.to_owned()),
        ],
    });
    match ask(query, NLM_F_ACK) {
        Ok(found) => Ok(found.into_iter().find_map(describe)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(NftError::of(|| {
            format!("look up the chain {name:?} of the table {TABLE:?} in netfilter")
        })(error)),
    }
}

fn describe(message: NfTablesMessage) -> Option<Chain> {
    let NfTablesMessage::NewChain(ChainMessage { attributes }) = message else {
        return None;
    };
    let mut chain = Chain {
        name: String::new(),
        rules: 0,
    };
    let mut ours = false;
    for attribute in attributes {
        match attribute {
            ChainAttribute::Table(table) => ours = table == TABLE,
            ChainAttribute::Name(name) => chain.name = name,
            ChainAttribute::Use(count) => chain.rules = count,
            _ => {}
        }
    }
    ours.then_some(chain)
}

/// Makes a chain that masquerades what comes from `subnets`, except to the destinations
/// of `exempt` and to groups. One that is there already stays as it is.
///
/// # Errors
///
/// [`NftError`].
pub fn add_chain(name: &str, subnets: &[IpNet], exempt: &[IpNet]) -> Result<(), NftError> {
    let mut batch = vec![
        (
            NfTablesMessage::NewTable(TableMessage {
                attributes: vec![TableAttribute::Name(TABLE.to_owned())],
            }),
            NLM_F_CREATE,
        ),
        (
            NfTablesMessage::NewChain(ChainMessage {
                attributes: vec![
                    ChainAttribute::Table(TABLE.to_owned()),
                    ChainAttribute::Name(name.to_owned()),
                    ChainAttribute::Policy(ACCEPT),
                    ChainAttribute::Type("nat".to_owned()),
                    ChainAttribute::Hook(vec![
                        Hook::Number(InetHookNumber::PostRouting.into()),
                        Hook::Priority(SRCNAT),
                    ]),
                ],
            }),
            NLM_F_CREATE | NLM_F_EXCL,
        ),
    ];
    let groups = MULTICAST.iter().filter_map(|net| net.parse().ok());
    let leave = exempt
        .iter()
        .copied()
        .chain(groups)
        .map(|net| (End::Destination, net, leave_alone()));
    let masquerade = subnets.iter().map(|&net| (End::Source, net, masquerade()));
    for (end, net, what) in leave.chain(masquerade) {
        let expressions = matching(end, net).into_iter().chain([what]);
        let rule = RuleMessage {
            attributes: vec![
                RuleAttribute::Table(TABLE.to_owned()),
                RuleAttribute::Chain(name.to_owned()),
                RuleAttribute::Expressions(expressions.map(Into::into).collect()),
            ],
        };
        batch.push((NfTablesMessage::NewRule(rule), NLM_F_CREATE | NLM_F_APPEND));
    }
    match change(batch) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        made => made.map_err(NftError::of(|| {
            format!("make the chain {name:?} of the table {TABLE:?} in netfilter")
        })),
    }
}

/// Deletes a chain and its rules, and the table with the last one.
///
/// # Errors
///
/// [`NftError`].
pub fn delete_chain(name: &str) -> Result<(), NftError> {
    let chain = NfTablesMessage::DeleteChain(ChainMessage {
        attributes: vec![
            ChainAttribute::Table(TABLE.to_owned()),
            ChainAttribute::Name(name.to_owned()),
        ],
    });
    let table = NfTablesMessage::DeleteTable(TableMessage {
        attributes: vec![TableAttribute::Name(TABLE.to_owned())],
    });
    for (message, flags) in [(chain, 0), (table, NLM_F_NONREC)] {
        match change(vec![(message, flags)]) {
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ENOENT))
                    // Others have chains there.
                    || flags != 0 && error.raw_os_error() == Some(libc::EBUSY) => {}
            deleted => deleted.map_err(NftError::of(|| {
                format!("delete the chain {name:?} of the table {TABLE:?} in netfilter")
            }))?,
        }
    }
    Ok(())
}

/// Which address of a packet.
#[derive(Clone, Copy)]
enum End {
    Source,
    Destination,
}

/// Whether a packet's address is in `net`.
fn matching(end: End, net: IpNet) -> Vec<Expressions> {
    let (family, length) = match net {
        IpNet::V4(_) => (NetfilterProtoFamily::IPv4, 4),
        IpNet::V6(_) => (NetfilterProtoFamily::IPv6, 16),
    };
    // Where the source is in the header; the destination follows.
    let source = match net {
        IpNet::V4(_) => 12,
        IpNet::V6(_) => 8,
    };
    let offset = match end {
        End::Source => source,
        End::Destination => source + length,
    };
    let bytes = |address| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let equal = |value| {
        Expressions::Cmp(vec![
            Cmp::SourceRegister(Register::Reg1),
            Cmp::Op(Operator::Equal),
            Cmp::Data(DataAttribute::Value(value)),
        ])
    };
    vec![
        Expressions::Meta(vec![
            Meta::Key(MetaKey::Nfproto),
            Meta::DestinationRegister(Register::Reg1),
        ]),
        equal(vec![family.into()]),
        Expressions::Payload(vec![
            Payload::DestinationRegister(Register::Reg1),
            Payload::Base(NETWORK_HEADER),
            Payload::Offset(offset),
            Payload::Len(length),
        ]),
        Expressions::Bitwise(vec![
            Bitwise::SourceRegister(Register::Reg1),
            Bitwise::DestinationRegister(Register::Reg1),
            Bitwise::Length(length),
            Bitwise::Mask(DataAttribute::Value(bytes(net.netmask()))),
            Bitwise::Xor(DataAttribute::Value(vec![0; length as usize])),
        ]),
        equal(bytes(net.network())),
    ]
}

/// The end of the chain for a packet.
fn leave_alone() -> Expressions {
    Expressions::Immediate(vec![
        Immediate::DestinationRegister(Register::Verdict),
        Immediate::Data(DataAttribute::Verdict(vec![VerdictAttribute::Code(
            Verdict::Return,
        )])),
    ])
}

fn masquerade() -> Expressions {
    Expressions::Other {
        expression_type: "masq".to_owned(),
        attributes: vec![],
    }
}

fn connect() -> io::Result<Socket> {
    let socket = Socket::new(NETLINK_NETFILTER)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

fn message(
    family: NetfilterProtoFamily,
    inner: impl Into<NetfilterMessageInner>,
    flags: u16,
) -> NetlinkMessage<NetfilterMessage> {
    let resource = match family {
        NetfilterProtoFamily::Unspec => u8::from(NetfilterSubsystem::NfTables).into(),
        _ => 0,
    };
    let header = NetfilterHeader::new(family, 0, resource);
    let mut message = NetlinkMessage::from(NetfilterMessage::new(header, inner));
    message.header.flags = NLM_F_REQUEST | flags;
    message
}

fn write(message: &mut NetlinkMessage<NetfilterMessage>, bytes: &mut Vec<u8>) {
    message.finalize();
    let start = bytes.len();
    bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut bytes[start..]);
}

/// Makes all of these changes, or none.
fn change(messages: Vec<(NfTablesMessage, u16)>) -> io::Result<()> {
    let last = u32::try_from(messages.len()).unwrap_or(u32::MAX);
    let none = NetfilterProtoFamily::Unspec;
    let mut bytes = Vec::new();
    write(
        &mut message(none, ControlMessage::BatchBegin, 0),
        &mut bytes,
    );
    for (number, (inner, flags)) in (1..).zip(messages) {
        let acknowledge = if number == last { NLM_F_ACK } else { 0 };
        let mut message = message(NetfilterProtoFamily::Inet, inner, flags | acknowledge);
        message.header.sequence_number = number;
        write(&mut message, &mut bytes);
    }
    write(&mut message(none, ControlMessage::BatchEnd, 0), &mut bytes);
    exchange(&bytes)?;
    fault::point("change of netfilter");
    Ok(())
}

fn ask(query: NfTablesMessage, flags: u16) -> io::Result<Vec<NfTablesMessage>> {
    let mut bytes = Vec::new();
    let mut message = message(NetfilterProtoFamily::Inet, query, flags);
    write(&mut message, &mut bytes);
    exchange(&bytes)
}

/// Sends a request, and reads all of the answer. What the kernel refuses of a batch it
/// tells before it acknowledges the last.
fn exchange(request: &[u8]) -> io::Result<Vec<NfTablesMessage>> {
    fault::request(Kind::Netlink, "netfilter")?;
    let socket = connect()?;
    socket.send(request, 0)?;
    let mut found = Vec::new();
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<NetfilterMessage>::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            match message.payload {
                NetlinkPayload::InnerMessage(NetfilterMessage {
                    inner: NetfilterMessageInner::NfTables(inner),
                    ..
                }) => found.push(inner),
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(error.to_io());
                }
                NetlinkPayload::Done(done) if done.code != 0 => {
                    return Err(io::Error::from_raw_os_error(done.code.saturating_abs()));
                }
                NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(found),
                _ => {}
            }
            let length = (message.header.length as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::testing::Pair;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn chains_come_and_go_whole() {
        let pair = Pair::new();
        let work = || {
            assert_eq!(chains().unwrap(), []);
            let subnets = nets(&["10.1.0.0/16", "fd00:1::/64"]);
            let exempt = nets(&["10.1.0.0/16", "192.0.2.1/32", "::/0"]);
            let rules = rule_count(&subnets, &exempt);
            assert_eq!(rules, 7);
            let made = |name: &str| Chain {
                name: name.to_owned(),
                rules,
            };
            // Twice is once.
            for _ in 0..2 {
                add_chain("one", &subnets, &exempt).unwrap();
                assert_eq!(chains().unwrap(), [made("one")]);
            }
            assert_eq!(chain("one").unwrap(), Some(made("one")));
            assert_eq!(chain("two").unwrap(), None);
            add_chain("two", &subnets, &exempt).unwrap();
            assert_eq!(chains().unwrap(), [made("one"), made("two")]);
            for _ in 0..2 {
                delete_chain("one").unwrap();
                assert_eq!(chains().unwrap(), [made("two")]);
            }
            delete_chain("two").unwrap();
            assert_eq!(chains().unwrap(), []);
        };
        pair.sandbox.run_in(work).unwrap();
    }

    #[test]
    fn a_refusal_names_the_chain() {
        let pair = Pair::new();
        let name = "x".repeat(300);
        let error = pair
            .sandbox
            .run_in(|| add_chain(&name, &[], &[]))
            .unwrap()
            .unwrap_err();
        assert!(error.to_string().contains(&name), "{error}");
    }
}
