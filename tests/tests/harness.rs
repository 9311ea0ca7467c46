//! That the harness itself works, without any plugin of ours: what it says must
//! be believed by every other test.

use std::{
    fs,
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, UdpSocket},
    path::Path,
    process::Command,
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{
    Client, EchoServer, Frame, MacAddr, Meeting, Namespace, Node, Offload, Packet, PacketSocket,
    Receive as _, ReceiveFrom as _, Snapshot, Verb, wait_for,
};
use nix::sys::{
    pthread::{pthread_kill, pthread_self},
    signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
};

const SECOND: Duration = Duration::from_secs(1);

/// A node with any plugin: these tests do not call it.
fn node() -> Result<Node> {
    Node::with_plugin(Path::new("/bin/true"))
}

/// Two sandboxes with one veth pair between them, both ends named `eth0`.
fn pair(
    node: &Node,
) -> Result<(
    impl Fn() -> IpAddr,
    bpf_bridge_tests::Sandbox,
    bpf_bridge_tests::Sandbox,
)> {
    let (a, b) = (node.sandbox("a")?, node.sandbox("b")?);
    node.ip("link add eth0 netns a type veth peer name eth0 netns b")?;
    a.ip("link set eth0 up\naddr add 10.0.0.1/24 dev eth0")?;
    b.ip("link set eth0 up\naddr add 10.0.0.2/24 dev eth0")?;
    // The carrier comes when the kernel has time.
    wait_for("a carrier", 10 * SECOND, || {
        Ok(a.ping(IpAddr::from([10, 0, 0, 2]), 1).is_ok())
    })?;
    Ok((|| IpAddr::from([10, 0, 0, 2]), a, b))
}

#[test]
fn a_node_sees_nothing_of_the_machine_and_leaves_nothing_on_it() -> Result<()> {
    // Others may be at work on the machine: only what bears these names counts.
    let pod = format!("pod-{}", std::process::id());
    let seen = || -> Result<bool> {
        let devices = Command::new("ip").arg("link").output()?;
        Ok(fs::read_to_string("/proc/self/mounts")?.contains(&pod)
            || String::from_utf8(devices.stdout)?.contains("uplink0")
            || Path::new("/run/netns").join(&pod).exists()
            || Path::new("/var/lib/cni").join(&pod).exists()
            || Path::new("/sys/fs/bpf").join(&pod).exists())
    };
    let node = node()?;
    ensure!(node.device_names()? == ["lo"]);
    let outside = node.outside()?;
    outside.ping(IpAddr::from([198, 51, 100, 2]), 1)?;
    node.run(&format!("mkdir /var/lib/cni/{pod} /sys/fs/bpf/{pod}"))?;
    let sandbox = node.sandbox(&pod)?;
    ensure!(sandbox.device_names()? == ["lo"]);
    ensure!(!seen()?);
    drop((sandbox, outside, node));
    ensure!(!seen()?);
    Ok(())
}

#[test]
fn a_nodes_root_cgroup_is_not_the_machines() -> Result<()> {
    let node = node()?;
    let sandbox = node.sandbox("pod")?;
    let seen = |namespace: &Namespace| -> Result<[String; 2]> {
        let cgroups = namespace.run("cat /proc/self/cgroup")?;
        let own = cgroups.lines().find(|line| line.starts_with("0::"));
        let own = own.unwrap_or_default().to_owned();
        Ok([own, namespace.run("readlink /proc/self/ns/cgroup")?])
    };
    let [own, namespace] = seen(&node)?;
    ensure!(own == "0::/all", "{own}");
    ensure!(namespace.trim() != fs::read_link("/proc/self/ns/cgroup")?.to_string_lossy());
    ensure!(seen(&sandbox)? == [own, namespace]);
    // The machine sees all of it below a cgroup of this process's name.
    let machines = fs::read_to_string("/proc/self/cgroup")?;
    let expected = format!("/bpf-bridge-{}/all\n", std::process::id());
    ensure!(machines.ends_with(&expected), "{machines}");
    Ok(())
}

#[test]
fn echo_and_ping_tell_whether_a_packet_comes_back() -> Result<()> {
    let node = node()?;
    let (address, a, b) = pair(&node)?;
    let server = EchoServer::start(&b, address())?;
    a.ping(address(), 2)?;
    a.tcp_echo(server.address(), b"over TCP", SECOND)?;
    a.udp_echo(server.address(), b"over UDP", SECOND)?;
    ensure!(a.tcp_transfer(server.address(), 3_000_001)?.bytes == 3_000_001);
    b.ip("link set eth0 down")?;
    let limit = Duration::from_millis(50);
    ensure!(a.ping_with(address(), 1, &["-W", "0.05"]).is_err());
    ensure!(a.tcp_echo(server.address(), b"over TCP", limit).is_err());
    ensure!(a.udp_echo(server.address(), b"over UDP", limit).is_err());
    Ok(())
}

#[test]
fn a_transfer_that_changes_on_the_way_is_noticed() -> Result<()> {
    let node = node()?;
    let (_, a, b) = pair(&node)?;
    let listener = b.within(|| Ok(std::net::TcpListener::bind("10.0.0.2:0")?))?;
    let address = listener.local_addr()?;
    let liar = thread::spawn(move || -> std::io::Result<()> {
        use std::io::{Read as _, Write as _};
        let (mut stream, _) = listener.accept()?;
        let mut bytes = vec![0; 10_000];
        stream.read_exact(&mut bytes)?;
        bytes.swap(4_000, 4_001);
        stream.write_all(&bytes)
    });
    ensure!(a.tcp_transfer(address, 10_000).is_err());
    ensure!(liar.join().is_ok());
    Ok(())
}

#[test]
fn packet_sockets_show_frames_as_they_were_on_the_wire() -> Result<()> {
    let node = node()?;
    let (_, a, b) = pair(&node)?;
    let (from, to) = (
        PacketSocket::open(&a, "eth0")?,
        PacketSocket::open(&b, "eth0")?,
    );
    let mac = MacAddr::of_device(&a, "eth0")?;
    let stranger = MacAddr([2, 0, 0, 0, 0, 9]);
    for (frame, for_other) in [
        (
            Frame::new(MacAddr::BROADCAST, mac, Frame::EXPERIMENTAL, &[7; 60]),
            false,
        ),
        (
            Frame::tagged(MacAddr::BROADCAST, mac, 0xa123, &[8; 60]),
            false,
        ),
        (
            Frame::new(stranger, mac, Frame::EXPERIMENTAL, &[9; 60]),
            true,
        ),
    ] {
        from.send(&frame)?;
        let seen = to.receive(SECOND, |seen| seen.bytes == frame.0)?;
        ensure!(
            seen.is_some_and(|seen| seen.for_other == for_other),
            "{frame:?}"
        );
        ensure!(
            from.receive(Duration::from_millis(10), |seen| seen.source() == mac)?
                .is_none()
        );
    }
    Ok(())
}

#[test]
fn frames_of_arp_and_neighbour_discovery_are_understood_by_the_kernel() -> Result<()> {
    let node = node()?;
    let (_, a, b) = pair(&node)?;
    b.ip("addr add fd00::2/64 dev eth0 nodad")?;
    a.ip("addr add fd00::1/64 dev eth0 nodad")?;
    let socket = PacketSocket::open(&a, "eth0")?;
    let mac = MacAddr::of_device(&a, "eth0")?;
    socket.send(&Frame::arp_probe(mac, "10.0.0.2".parse()?))?;
    ensure!(
        socket
            .receive(SECOND, |seen| seen.ethertype() == Frame::ARP
                && seen.bytes[21] == 2)?
            .is_some()
    );
    let question = Frame::solicitation(mac, "fd00::1".parse()?, "fd00::2".parse()?);
    let advertised = |seen: &bpf_bridge_tests::Captured| {
        seen.ethertype() == Frame::IPV6 && seen.bytes.get(54) == Some(&136)
    };
    // On a busy machine the kernel takes its time to have the address.
    wait_for("advertisement", SECOND, || {
        socket.send(&question)?;
        let answer = socket.receive(Duration::from_millis(100), advertised)?;
        Ok(answer.is_some())
    })?;

    // A neighbour that moves is believed to have moved.
    let neighbour =
        |address: &str| -> Result<String> { b.run(&format!("ip neigh show {address}")) };
    b.ip(
        "neigh replace 10.0.0.9 lladdr 02:00:00:00:00:01 nud stale dev eth0\n\
          neigh replace fd00::9 lladdr 02:00:00:00:00:01 nud stale dev eth0",
    )?;
    let moved = MacAddr([2, 0, 0, 0, 0, 2]);
    socket.send(&Frame::gratuitous_arp(moved, "10.0.0.9".parse()?))?;
    socket.send(&Frame::unsolicited_advertisement(moved, "fd00::9".parse()?))?;
    for address in ["10.0.0.9", "fd00::9"] {
        wait_for(&format!("new neighbour entry of {address}"), SECOND, || {
            Ok(neighbour(address)?.contains("00:02"))
        })?;
    }
    Ok(())
}

#[test]
fn ip_packets_are_understood_by_the_kernel() -> Result<()> {
    let node = node()?;
    let (_, a, b) = pair(&node)?;
    a.ip("addr add fd00::1/64 dev eth0 nodad")?;
    b.ip("addr add fd00::2/64 dev eth0 nodad")?;
    let wire = PacketSocket::open(&a, "eth0")?;
    let (from, to) = (
        MacAddr::of_device(&a, "eth0")?,
        MacAddr::of_device(&b, "eth0")?,
    );
    for (client, server) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
        let (client, server): (IpAddr, IpAddr) = (client.parse()?, server.parse()?);
        let (client, server) = ((client, 4000).into(), (server, 4001).into());
        let _server = EchoServer::start_as(&b, server, "b")?;
        let socket = a.within(|| Ok(UdpSocket::bind(client)?))?;
        socket.set_read_timeout(Some(SECOND))?;
        let payload: Vec<u8> = (0..=255).cycle().take(3000).collect();
        let short = Packet::udp(client, server, &payload[..500]);
        let long = Packet::udp(client, server, &payload);
        let backwards = |packet: &Packet| -> Vec<Vec<u8>> {
            packet.fragments(7, 1200).into_iter().rev().collect()
        };
        for (packets, length) in [
            (vec![short.bytes()], 500),
            (vec![short.clone().with_options().bytes()], 500),
            (vec![short.with_hop_by_hop_options().bytes()], 500),
            (long.fragments(8, 1000), 3000),
            (backwards(&long), 3000),
            (backwards(&long.clone().with_options()), 3000),
        ] {
            for packet in &packets {
                wire.send(&Frame::ip(to, from, packet))?;
            }
            let mut answer = vec![0; 4000];
            let received = socket.receive(&mut answer)?;
            let meeting = Meeting::parse(&answer[..received], &payload[..length])?;
            ensure!(meeting.server == "b" && meeting.client == client);
        }

        // A router's complaint about what the server sent.
        let answer = Packet::udp(server, client, &payload);
        let complaint = Packet::too_big(client.ip(), &answer, 1300);
        wire.send(&Frame::ip(to, from, &complaint.bytes()))?;
        wait_for("smaller path", SECOND, || {
            let route = b.run(&format!("ip route get {}", client.ip()))?;
            Ok(route.contains("mtu 1300"))
        })?;

        // A reset for nobody is ignored, one for a connection ends it.
        let stream = a.tcp_connect_from((client.ip(), 4002).into(), server, SECOND)?;
        stream.set_read_timeout(Some(SECOND))?;
        let mut greeting = [0; 2];
        (&stream).read_exact(&mut greeting)?;
        ensure!(&greeting == b"b ");
        wire.send(&Frame::ip(
            to,
            from,
            &Packet::tcp_reset((client.ip(), 4002).into(), server, 1).bytes(),
        ))?;
        (&stream).write_all(b"still there?")?;
        ensure!(stream.receive(&mut greeting)? > 0);
    }
    Ok(())
}

#[test]
fn offloads_can_be_switched() -> Result<()> {
    let node = node()?;
    let (_, a, _b) = pair(&node)?;
    for offload in [
        Offload::TxChecksum,
        Offload::TcpSegmentation,
        Offload::GenericSegmentation,
    ] {
        ensure!(a.offload("eth0", offload)?, "{offload:?}");
    }
    a.set_offload("eth0", Offload::TxChecksum, false)?;
    // It needs the other.
    ensure!(!a.offload("eth0", Offload::TcpSegmentation)?);
    a.set_offload("eth0", Offload::GenericSegmentation, false)?;
    a.set_offload("eth0", Offload::TxChecksum, true)
}

#[test]
fn a_socket_hears_what_comes_after_an_interruption() -> Result<()> {
    extern "C" fn handler(_: i32) {}
    let interrupt = SigAction::new(
        SigHandler::Handler(handler),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: a handler that does nothing may be called at any time.
    unsafe { sigaction(Signal::SIGUSR1, &interrupt) }?;
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let sender = UdpSocket::bind("127.0.0.1:0")?;
    sender.connect(socket.local_addr()?)?;
    let (said, heard) = mpsc::channel();
    thread::scope(|scope| {
        let listener = scope.spawn(|| -> Result<()> {
            let _ = said.send(pthread_self());
            socket.set_read_timeout(Some(10 * SECOND))?;
            ensure!(socket.receive(&mut [0; 9])? == 5);
            ensure!(socket.receive_from(&mut [0; 9])?.0 == 5);
            // Interruptions do not make silence longer than twice the time.
            socket.set_read_timeout(Some(SECOND / 10))?;
            let end = socket.receive(&mut [0; 9]);
            ensure!(end.is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
            Ok(())
        });
        let thread = heard.recv()?;
        for number in 0..100 {
            thread::sleep(SECOND / 100);
            if listener.is_finished() {
                break;
            }
            // It may just have ended.
            let _ = pthread_kill(thread, Signal::SIGUSR1);
            if number == 5 || number == 10 {
                sender.send(b"hello")?;
            }
        }
        ensure!(listener.is_finished(), "it listens for ever");
        listener
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[test]
fn a_meeting_tells_whom_the_server_sees() -> Result<()> {
    let node = node()?;
    let (address, a, b) = pair(&node)?;
    let _server = EchoServer::start_as(&b, (address(), 4000).into(), "b")?;
    for client in Client::ALL {
        let local = "10.0.0.1:4001".parse()?;
        let meeting = a.meet_from(client, local, (address(), 4000).into(), SECOND)?;
        ensure!(
            meeting.server == "b" && meeting.client == local,
            "{meeting:?}"
        );
        ensure!(a.meet(client, (address(), 4002).into(), SECOND).is_err());
    }
    // One without a name is not met.
    let silent = EchoServer::start(&b, address())?;
    ensure!(a.meet(Client::Udp, silent.address(), SECOND).is_err());
    Ok(())
}

#[test]
fn a_snapshot_shows_devices_addresses_routes_files_and_map_entries() -> Result<()> {
    let node = node()?;
    let before = Snapshot::take(&node)?;
    before.ensure_same(&Snapshot::take(&node)?)?;
    node.ip("link add dummy0 type bridge\nlink set dummy0 up\naddr add 10.1.0.1/24 dev dummy0")?;
    node.run("mkdir -p /var/lib/cni/networks/net")?;
    node.run("touch /var/lib/cni/networks/net/10.1.0.2")?;
    node.run("bpftool map create /sys/fs/bpf/M type hash key 4 value 4 entries 8 name m")?;
    let empty_map = Snapshot::take(&node)?;
    node.run("bpftool map update pinned /sys/fs/bpf/M key 1 0 0 0 value 1 0 0 0")?;
    let after = Snapshot::take(&node)?;
    for word in [
        "+device dummy0",
        "+address 10.1.0.1/24 on dummy0",
        "+route -4  10.1.0.0/24",
        "+file /var/lib/cni/networks/net/10.1.0.2",
        "+pin /sys/fs/bpf/M",
    ] {
        let changes = before.changes(&after);
        ensure!(
            changes.iter().any(|change| change.starts_with(word)),
            "{word}: {changes:#?}"
        );
    }
    ensure!(
        empty_map.changes(&after).len() == 2,
        "{:?}",
        empty_map.changes(&after)
    );
    ensure!(before.ensure_same(&after).is_err());
    Ok(())
}

#[test]
fn a_call_reports_output_status_and_peak_memory() -> Result<()> {
    let node = node()?;
    node.install_script("echo", "#!/bin/sh\ncat\necho $CNI_COMMAND >&2\nexit 3\n")?;
    let reply = bpf_bridge_tests::Call::new("echo", Verb::Check)
        .stdin(r#"{"code":7,"msg":"m"}"#)
        .run(&node)?;
    ensure!(reply.status.code() == Some(3) && reply.stderr.trim() == "CHECK");
    ensure!(reply.failure()?.code == 7 && reply.success().is_err());
    ensure!(
        reply.peak_rss > 100_000 && reply.duration > Duration::ZERO,
        "{reply:?}"
    );
    Ok(())
}

#[test]
fn a_process_ends_with_its_handle() -> Result<()> {
    let node = node()?;
    let log = std::env::temp_dir().join(format!("bpf-bridge-tests.{}.log", std::process::id()));
    let running =
        |node: &Namespace| -> Result<bool> { Ok(node.run("ss -Hltn")?.contains(":4321")) };
    let process = node.spawn(
        Command::new("busybox").args(["nc", "-l", "-p", "4321"]),
        &log,
    )?;
    wait_for("listener", SECOND, || running(&node))?;
    drop(process);
    ensure!(!running(&node)?);
    fs::remove_file(log)?;
    Ok(())
}

#[test]
fn the_readme_names_tests_that_there_are() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("../README.md"))?;
    let (_, promises) = readme
        .split_once("## What it promises")
        .context("no promises")?;
    let (promises, _) = promises.split_once("\n## ").context("no end of them")?;
    let mut named = 0;
    for row in promises
        .lines()
        .filter(|line| line.starts_with("| "))
        .skip(1)
    {
        let (_, holders) = row
            .trim_end_matches(" |")
            .rsplit_once('|')
            .context("no table")?;
        for holder in holders.split('`').skip(1).step_by(2) {
            if !holder.starts_with("cargo ") {
                ensure!(is_test(&root.join("tests"), holder)?, "{holder}: {row}");
                named += 1;
            }
        }
    }
    ensure!(named > 10, "{named}");
    Ok(())
}

/// Whether `file::module::test`, or a beginning of it, is there.
fn is_test(tests: &Path, name: &str) -> Result<bool> {
    let path = name.replace("::", "/");
    if tests.join(&path).is_dir() || tests.join(&path).with_extension("rs").is_file() {
        return Ok(true);
    }
    let Some((file, test)) = path.rsplit_once('/') else {
        return Ok(false);
    };
    let file = tests.join(file).with_extension("rs");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    Ok(text.contains(&format!("#[test]\nfn {test}(")))
}
