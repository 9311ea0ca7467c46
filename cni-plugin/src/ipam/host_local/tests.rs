//! The store as a whole.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    io::{Read as _, Write as _},
    net::IpAddr,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Barrier,
};

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    directory::{crash_after, steps},
    *,
};

const STOCK: &str = "/usr/lib/cni/host-local";
const NET: &str = "net";

/// A data directory and a boot.
struct Node {
    dir: TempDir,
    boot: &'static str,
}

fn owner<'a>(container_id: &'a str) -> Owner<'a> {
    Owner {
        container_id,
        ifname: "eth0",
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn alive(_: Owner<'_>) -> bool {
    true
}

fn dead(_: Owner<'_>) -> bool {
    false
}

fn config(ipam: Value) -> Config {
    Config::parse(&ipam, Requests::default(), "1.1.0").unwrap()
}

fn requesting(ipam: Value, ips: &str) -> Config {
    let requests = Requests {
        cni_args_ip: Some(ips),
        ..Requests::default()
    };
    Config::parse(&ipam, requests, "1.1.0").unwrap()
}

fn subnet(subnet: &str) -> Config {
    config(json!({"subnet": subnet}))
}

fn dual() -> Config {
    config(json!({"ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]]}))
}

impl Node {
    /// In memory if possible: what is tested here is not the disk.
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        Self {
            dir: dir.unwrap(),
            boot: "first-boot",
        }
    }

    fn on_disk() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            boot: "first-boot",
        }
    }

    fn store(&self) -> Store {
        Store::open_in_boot(self.dir.path(), NET, self.boot.into()).unwrap()
    }

    fn net(&self) -> PathBuf {
        self.dir.path().join(NET)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.net().join(name)
    }

    fn write(&self, name: &str, content: &str) {
        fs::create_dir_all(self.net()).unwrap();
        fs::write(self.path(name), content).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// All leases: address and text.
    fn leases(&self) -> BTreeMap<String, String> {
        let entries = fs::read_dir(self.net())
            .unwrap()
            .map(|entry| entry.unwrap());
        entries
            .map(|entry| entry.file_name().into_string().unwrap())
            .filter(|name| name.parse::<IpAddr>().is_ok())
            .map(|name| (name.clone(), self.read(&name)))
            .collect()
    }

    fn index(&self) -> Vec<String> {
        let dir = self.dir.path().join(".bpf-bridge").join(NET);
        let names = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names
            .map(|name| name.into_string().unwrap())
            .filter(|name| name != "state")
            .collect();
        names.sort();
        names
    }

    fn add(&self, id: &str, config: &Config) -> Result<Vec<String>, String> {
        self.add_if(id, config, &alive)
    }

    fn add_if(
        &self,
        id: &str,
        config: &Config,
        alive: &dyn Fn(Owner<'_>) -> bool,
    ) -> Result<Vec<String>, String> {
        let lease = self.store().allocate(owner(id), config, alive);
        let lease = lease.map_err(|error| error.to_string())?;
        Ok(lease
            .allocations
            .iter()
            .map(|it| it.address.to_string())
            .collect())
    }

    fn del(&self, id: &str) -> Vec<IpAddr> {
        self.store().release(owner(id)).unwrap()
    }
}

fn text(id: &str) -> String {
    format!("{id}\r\neth0")
}

// What the stock plugin's own tests look at.

#[test]
fn gives_and_takes_in_the_stock_format() {
    let node = Node::on_disk();
    let lease = node
        .store()
        .allocate(owner("abc"), &dual(), &alive)
        .unwrap();
    assert_eq!(
        lease.allocations,
        [
            Allocation {
                address: "10.1.0.2/24".parse().unwrap(),
                gateway: Some(ip("10.1.0.1"))
            },
            Allocation {
                address: "fd00::2/64".parse().unwrap(),
                gateway: Some(ip("fd00::1"))
            },
        ]
    );
    for name in ["10.1.0.2", "fd00::2"] {
        assert_eq!(node.read(name), "abc\r\neth0");
        assert_eq!(
            fs::metadata(node.path(name)).unwrap().permissions().mode() & 0o7777,
            0o600
        );
    }
    assert_eq!(node.read("last_reserved_ip.0"), "10.1.0.2");
    assert_eq!(node.read("last_reserved_ip.1"), "fd00::2");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&node.net()), 0o755);
    assert_eq!(mode(&node.dir.path().join(".bpf-bridge")), 0o700);
    assert_eq!(
        node.store().check(owner("abc")).unwrap(),
        [ip("10.1.0.2"), ip("fd00::2")]
    );

    assert_eq!(node.del("abc"), [ip("10.1.0.2"), ip("fd00::2")]);
    assert!(node.leases().is_empty());
    assert!(node.index().is_empty());
    assert_eq!(
        node.read("last_reserved_ip.0"),
        "10.1.0.2",
        "the order outlives the lease"
    );
    let error = node.store().check(owner("abc")).unwrap_err().to_string();
    assert!(error.contains("abc") && error.contains("eth0"), "{error}");
    assert!(node.del("abc").is_empty());
    // Nothing but what the stock plugin would have left either.
    let mut left: Vec<_> = fs::read_dir(node.net())
        .unwrap()
        .map(|it| it.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["last_reserved_ip.0", "last_reserved_ip.1", "lock"]);
}

#[test]
fn an_unknown_network_is_left_unknown() {
    let node = Node::new();
    assert!(
        Store::open_existing(node.dir.path(), NET)
            .unwrap()
            .is_none()
    );
    assert_eq!(fs::read_dir(node.dir.path()).unwrap().count(), 0);
    node.add("abc", &dual()).unwrap();
    let store = Store::open_existing(node.dir.path(), NET).unwrap().unwrap();
    assert!(store.release(owner("nobody")).unwrap().is_empty());
    for name in ["", "..", ".bpf-bridge", "a/b", "a b", "-x"] {
        let error = Store::open(node.dir.path(), name).unwrap_err();
        assert!(matches!(error, StoreError::Network(_)), "{error}");
    }
}

#[test]
fn each_interface_has_its_own() {
    let node = Node::new();
    let both = ["eth0", "eth1"].map(|ifname| Owner {
        container_id: "abc",
        ifname,
    });
    let config = subnet("10.1.0.0/24");
    let _leases = both.map(|it| node.store().allocate(it, &config, &alive).unwrap());
    assert_eq!(node.read("10.1.0.2"), "abc\r\neth0");
    assert_eq!(node.read("10.1.0.3"), "abc\r\neth1");
    assert_eq!(node.store().release(both[0]).unwrap(), [ip("10.1.0.2")]);
    assert_eq!(node.store().check(both[1]).unwrap(), [ip("10.1.0.3")]);
}

#[test]
fn a_second_add_is_refused_and_harms_nothing() {
    let node = Node::new();
    node.add("abc", &dual()).unwrap();
    let error = node.add("abc", &dual()).unwrap_err();
    assert_eq!(
        error,
        "10.1.0.2 has been allocated to abc for \"eth0\", duplicate allocation is not allowed"
    );
    assert_eq!(node.leases().len(), 2);
    // By a request too, and in a network that was given another range since, not.
    let error = node.add(
        "abc",
        &requesting(json!({"subnet": "10.1.0.0/24"}), "10.1.0.9"),
    );
    assert!(error.unwrap_err().contains("duplicate allocation"));
    assert_eq!(
        node.add("abc", &subnet("10.2.0.0/24")).unwrap(),
        ["10.2.0.2/24"]
    );
    assert_eq!(node.del("abc").len(), 3);
    assert!(node.leases().is_empty());
}

#[test]
fn ids_are_trimmed_and_bad_owners_refused() {
    let node = Node::new();
    node.add(" abc\n", &dual()).unwrap();
    assert_eq!(node.read("10.1.0.2"), "abc\r\neth0");
    for (container_id, ifname) in [
        ("", "eth0"),
        ("a b", "eth0"),
        ("../x", "eth0"),
        ("abc", ""),
        ("abc", "a/b"),
    ] {
        let owner = Owner {
            container_id,
            ifname,
        };
        let error = node.store().allocate(owner, &dual(), &alive).unwrap_err();
        assert!(matches!(error, StoreError::Owner { .. }), "{error}");
        assert!(node.store().release(owner).unwrap().is_empty());
    }
    assert_eq!(node.del("abc").len(), 2);
    let long = "a".repeat(400);
    node.add(&long, &dual()).unwrap();
    assert!(node.add(&long, &dual()).unwrap_err().contains("duplicate"));
    assert_eq!(node.del(&long).len(), 2);
}

#[test]
fn leases_with_only_an_id_are_honoured() {
    let node = Node::new();
    node.write("10.1.0.2", "old");
    node.write("10.1.0.3", "older\n");
    assert_eq!(
        node.add("new", &subnet("10.1.0.0/24")).unwrap(),
        ["10.1.0.4/24"]
    );
    assert_eq!(node.store().check(owner("old")).unwrap(), [ip("10.1.0.2")]);
    assert!(
        node.add("old", &subnet("10.1.0.0/24"))
            .unwrap_err()
            .contains("duplicate")
    );
    assert_eq!(node.del("old"), [ip("10.1.0.2")]);
    assert_eq!(
        node.store().collect_garbage(&[owner("older")]).unwrap(),
        [ip("10.1.0.4")]
    );
    assert_eq!(node.del("older"), [ip("10.1.0.3")]);
}

#[test]
fn goes_on_after_the_last_one_and_round() {
    for (last, next) in [
        ("", "10.0.0.2"),
        ("10.0.0.2", "10.0.0.3"),
        ("10.0.0.5", "10.0.0.6"),
        ("10.0.0.6", "10.0.0.2"),
        ("128.0.0.1", "10.0.0.2"),
        ("junk", "10.0.0.2"),
        ("", "10.0.0.2"),
    ] {
        let node = Node::new();
        if !last.is_empty() {
            node.write("last_reserved_ip.0", last);
        }
        assert_eq!(
            node.add("a", &subnet("10.0.0.0/29")).unwrap(),
            [format!("{next}/29")],
            "{last}"
        );
        assert_eq!(node.read("last_reserved_ip.0"), next);
    }
    let node = Node::new();
    node.write("10.0.0.2", "x");
    node.write("10.0.0.4", "x");
    node.write("10.0.0.5", "x");
    node.write("last_reserved_ip.0", "10.0.0.3");
    assert_eq!(
        node.add("a", &subnet("10.0.0.0/29")).unwrap(),
        ["10.0.0.6/29"]
    );
    assert_eq!(
        node.add("b", &subnet("10.0.0.0/29")).unwrap(),
        ["10.0.0.3/29"]
    );
}

#[test]
fn gives_out_every_address_but_gateway_and_broadcast() {
    let node = Node::new();
    let config = config(json!({"ranges": [[
        {"subnet": "10.0.0.0/29", "rangeStart": "10.0.0.0", "rangeEnd": "10.0.0.7", "gateway": "10.0.0.3"},
        {"subnet": "10.0.1.0/30"},
    ]]}));
    let mut given: Vec<_> = (0..6)
        .map(|n| node.add(&format!("c{n}"), &config).unwrap().remove(0))
        .collect();
    given.sort();
    assert_eq!(
        given,
        [
            "10.0.0.1/29",
            "10.0.0.2/29",
            "10.0.0.4/29",
            "10.0.0.5/29",
            "10.0.0.6/29",
            "10.0.1.2/30"
        ]
    );
    let full = "no IP addresses available in range set: 10.0.0.0-10.0.0.7,10.0.1.1-10.0.1.2";
    let error = node.add("late", &config).unwrap_err();
    assert_eq!(error, format!("failed to allocate for range 0: {full}"));
    let error = node
        .store()
        .check_free(&config, &alive)
        .unwrap_err()
        .to_string();
    assert!(error.contains(full), "{error}");
    node.del("c4");
    node.store().check_free(&config, &alive).unwrap();
    assert_eq!(node.add("late", &config).unwrap(), ["10.0.0.6/29"]);
}

#[test]
fn the_gateway_of_another_part_of_the_subnet_is_not_given_out() {
    let node = Node::new();
    let config = config(json!({"ranges": [[
        {"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.8", "rangeEnd": "10.0.0.9"},
        {"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.20", "rangeEnd": "10.0.0.21", "gateway": "10.0.0.8"},
    ]]}));
    assert_eq!(node.add("a", &config).unwrap(), ["10.0.0.9/24"]);
}

#[test]
fn a_set_that_fails_takes_back_the_others() {
    let node = Node::new();
    let config = config(json!({"ranges": [
        [{"subnet": "10.1.0.0/24"}],
        [{"subnet": "fd00::/64", "rangeStart": "fd00::5", "rangeEnd": "fd00::5"}],
    ]}));
    node.add("a", &config).unwrap();
    let error = node.add("b", &config).unwrap_err();
    assert!(
        error.contains("range 1") && error.contains("fd00::5-fd00::5"),
        "{error}"
    );
    assert_eq!(node.leases().len(), 2);
    assert_eq!(node.index(), ["a:eth0"]);
}

#[test]
fn requested_addresses() {
    let node = Node::new();
    let ipam = || {
        json!({"ranges": [
            [{"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.10", "rangeEnd": "10.1.0.20", "gateway": "10.1.0.15"}],
            [{"subnet": "fd00::/64"}],
            [{"subnet": "10.2.0.0/24"}],
        ]})
    };
    let add = |id: &str, ips: &str| node.add(id, &requesting(ipam(), ips));
    assert_eq!(
        add("a", "fd00::9,10.1.0.12").unwrap(),
        ["10.1.0.12/24", "fd00::9/64", "10.2.0.2/24"]
    );
    assert_eq!(node.read("last_reserved_ip.0"), "10.1.0.12");
    let before = node.leases();
    for (ips, expected) in [
        (
            "10.1.0.12",
            "requested IP address 10.1.0.12 is not available in range set 10.1.0.10-10.1.0.20: it is held by container a for interface \"eth0\"",
        ),
        (
            "10.1.0.15",
            "requested ip 10.1.0.15 is the gateway of subnet 10.1.0.0/24",
        ),
        ("10.1.0.9", "failed to allocate all requested IPs: 10.1.0.9"),
        (
            "10.1.0.21",
            "failed to allocate all requested IPs: 10.1.0.21",
        ),
        (
            "10.1.0.13,10.1.0.14",
            "failed to allocate all requested IPs: 10.1.0.14",
        ),
        (
            "192.0.2.1,fd01::1,10.1.0.13",
            "failed to allocate all requested IPs: 192.0.2.1 fd01::1",
        ),
    ] {
        assert_eq!(add("b", ips).unwrap_err(), expected);
        assert_eq!(node.leases(), before, "{ips} leaves nothing");
    }
    assert_eq!(add("b", "").unwrap()[0], "10.1.0.13/24");
}

#[test]
fn large_ipv6_ranges() {
    let node = Node::new();
    let config = subnet("fd00::/64");
    node.write("last_reserved_ip.0", "fd00::ffff:ffff:ffff:fffe");
    assert_eq!(
        node.add("a", &config).unwrap(),
        ["fd00::ffff:ffff:ffff:ffff/64"]
    );
    assert_eq!(node.add("b", &config).unwrap(), ["fd00::2/64"]);
    node.write(
        "last_reserved_ip.0",
        "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    );
    assert_eq!(node.add("c", &subnet("::/0")).unwrap(), ["::2/0"]);
}

// What the stock plugin does not do.

#[test]
fn empty_and_torn_files_are_free() {
    let node = Node::new();
    node.write("10.1.0.2", "");
    node.write("10.1.0.3", "\0\0\0\0\0");
    node.write("10.1.0.4", "\r\n");
    node.write("10.1.0.5", "kept for the printer");
    symlink("/etc/passwd", node.path("10.1.0.6")).unwrap();
    fs::create_dir(node.path("10.1.0.7")).unwrap();
    let config = subnet("10.1.0.0/28");
    let given: Vec<_> = ["a", "b", "c", "d"]
        .map(|id| node.add(id, &config).unwrap().remove(0))
        .into();
    assert_eq!(
        given,
        ["10.1.0.2/28", "10.1.0.3/28", "10.1.0.4/28", "10.1.0.8/28"]
    );
    assert_eq!(node.read("10.1.0.3"), text("b"));
    // Emptied while nobody looked.
    fs::write(node.path("10.1.0.9"), "").unwrap();
    node.add(
        "e",
        &requesting(json!({"subnet": "10.1.0.0/28"}), "10.1.0.9"),
    )
    .unwrap();
    let error = node
        .add(
            "f",
            &requesting(json!({"subnet": "10.1.0.0/28"}), "10.1.0.5"),
        )
        .unwrap_err();
    assert!(
        error.contains("a file that does not name a container"),
        "{error}"
    );
    node.store().collect_garbage(&[]).unwrap();
    assert_eq!(node.read("10.1.0.5"), "kept for the printer");
    assert!(node.path("10.1.0.6").is_symlink());
}

#[test]
fn symbolic_links_are_not_followed() {
    let node = Node::new();
    let victim = node.dir.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    fs::create_dir_all(node.net()).unwrap();
    symlink(&victim, node.path("last_reserved_ip.0")).unwrap();
    node.add("a", &subnet("10.1.0.0/24")).unwrap_err();
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    assert!(node.index().is_empty());
    assert!(!node.path("10.1.0.2").exists());
    fs::remove_file(node.path("last_reserved_ip.0")).unwrap();
    symlink(&victim, node.path("lock")).unwrap_err();
    fs::remove_file(node.path("lock")).unwrap();
    symlink(&victim, node.path("lock")).unwrap();
    node.add("a", &subnet("10.1.0.0/24")).unwrap_err();
}

#[test]
fn a_boot_ends_what_was_written_before_it() {
    let mut node = Node::new();
    node.write("10.1.0.2", &text("stock"));
    let config = subnet("10.1.0.0/24");
    node.add("a", &config).unwrap();
    node.add("b", &config).unwrap();
    node.boot = "second-boot";
    // `alive` is not asked: no veth outlives a boot.
    assert_eq!(node.add("c", &config).unwrap(), ["10.1.0.5/24"]);
    let left: Vec<_> = node.leases().into_values().collect();
    assert_eq!(left, [text("stock"), text("c")]);
    assert_eq!(node.index(), ["c:eth0", "stock:eth0"]);
    // The container that had it comes again.
    assert_eq!(node.add("a", &config).unwrap(), ["10.1.0.6/24"]);
    // Of another program's lease it is known since when it is there at least.
    assert_eq!(node.add("stock", &config).unwrap(), ["10.1.0.7/24"]);
    assert!(!node.path("10.1.0.2").exists());
}

#[test]
fn what_another_program_left_before_the_boot_gives_way_when_nothing_is_left() {
    let mut node = Node::new();
    let config = subnet("10.1.0.0/29");
    node.write("10.1.0.2", &text("stock"));
    node.write("10.1.0.3", "printer");
    node.add("a", &config).unwrap();
    node.boot = "second-boot";
    // Seen in this boot only: it may be of this boot.
    node.write("10.1.0.4", &text("lives"));
    let given = ["b", "c"].map(|id| node.add(id, &config).unwrap().remove(0));
    assert_eq!(given, ["10.1.0.5/29", "10.1.0.6/29"]);
    assert_eq!(node.read("10.1.0.2"), text("stock"));
    node.store().check_free(&config, &alive).unwrap();
    assert_eq!(node.add("d", &config).unwrap(), ["10.1.0.2/29"]);
    let error = node.add("e", &config).unwrap_err();
    assert!(error.contains("no IP addresses available"), "{error}");
    let left: BTreeSet<_> = node.leases().into_values().collect();
    let kept = ["lives", "b", "c", "d"].map(text);
    assert_eq!(left, kept.into_iter().chain(["printer".into()]).collect());
}

#[test]
fn without_a_boot_id_nothing_is_swept() {
    let mut node = Node::new();
    node.add("a", &dual()).unwrap();
    node.boot = "";
    node.add("b", &dual()).unwrap();
    assert_eq!(node.leases().len(), 4);
    node.boot = "second-boot";
    node.add("c", &dual()).unwrap();
    let left: BTreeSet<_> = node.leases().into_values().collect();
    assert_eq!(left, [text("b"), text("c")].into());
}

#[test]
fn the_dead_give_way_when_nothing_is_left() {
    let node = Node::new();
    let config = subnet("10.1.0.0/29");
    node.write("10.1.0.2", &text("stock"));
    let given = ["a", "b", "c"].map(|id| node.add(id, &config).unwrap().remove(0));
    assert_eq!(given, ["10.1.0.3/29", "10.1.0.4/29", "10.1.0.5/29"]);
    let under_way = node.store().allocate(owner("d"), &config, &alive).unwrap();

    assert!(
        node.add_if("e", &config, &alive)
            .unwrap_err()
            .contains("no IP addresses available")
    );
    let only_b_lives = |owner: Owner<'_>| owner.container_id == "b";
    node.store().check_free(&config, &only_b_lives).unwrap();
    assert_eq!(
        node.add_if("e", &config, &only_b_lives).unwrap(),
        ["10.1.0.3/29"]
    );
    let left: BTreeSet<_> = node.leases().into_values().collect();
    assert_eq!(left, ["stock", "b", "d", "e"].map(text).into());

    // Once its ADD is over, it counts whether there is a veth.
    node.add("f", &config).unwrap();
    drop(under_way);
    node.add_if("g", &config, &|owner| owner.container_id != "d")
        .unwrap();
    let left: BTreeSet<_> = node.leases().into_values().collect();
    assert_eq!(left, ["stock", "b", "e", "f", "g"].map(text).into());
    // The stock plugin's are never taken, though no veth of ours is theirs.
    for id in ["h", "i", "j", "k"] {
        node.add_if(id, &config, &dead).unwrap();
    }
    assert_eq!(node.read("10.1.0.2"), text("stock"));
}

#[test]
fn a_dead_owner_gives_all_it_has() {
    let node = Node::new();
    let config = config(json!({"ranges": [
        [{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64", "rangeEnd": "fd00::2"}],
    ]}));
    node.add("a", &config).unwrap();
    assert_eq!(
        node.add_if("b", &config, &dead).unwrap(),
        ["10.1.0.3/24", "fd00::2/64"]
    );
    assert_eq!(
        node.leases().into_values().collect::<Vec<_>>(),
        [text("b"), text("b")]
    );
}

#[test]
fn the_same_owner_comes_again() {
    let node = Node::new();
    let config = dual();
    let lease = node.store().allocate(owner("a"), &config, &alive).unwrap();
    // Its first ADD is under way, so there is no veth yet.
    assert!(
        node.add_if("a", &config, &dead)
            .unwrap_err()
            .contains("duplicate allocation")
    );
    drop(lease);
    assert!(
        node.add_if("a", &config, &alive)
            .unwrap_err()
            .contains("duplicate allocation")
    );
    assert_eq!(
        node.add_if("a", &config, &dead).unwrap(),
        ["10.1.0.3/24", "fd00::3/64"]
    );
    assert_eq!(node.leases().len(), 2);
    // Another program's lease may have a veth that is not known here.
    node.write("10.1.0.9", &text("stock"));
    assert!(
        node.add_if("stock", &config, &dead)
            .unwrap_err()
            .contains("duplicate allocation")
    );
}

#[test]
fn a_requested_address_is_taken_from_the_dead_only() {
    let node = Node::new();
    let request = requesting(json!({"subnet": "10.1.0.0/24"}), "10.1.0.7");
    node.add("a", &request).unwrap();
    assert!(
        node.add_if("b", &request, &alive)
            .unwrap_err()
            .contains("held by container a")
    );
    assert_eq!(node.add_if("b", &request, &dead).unwrap(), ["10.1.0.7/24"]);
    node.del("b");
    node.write("10.1.0.7", &text("stock"));
    assert!(
        node.add_if("b", &request, &dead)
            .unwrap_err()
            .contains("held by container stock")
    );
}

#[test]
fn a_lease_that_another_program_wrote_anew_is_not_ours() {
    let mut node = Node::new();
    let config = subnet("10.1.0.0/30");
    assert_eq!(node.add("a", &config).unwrap(), ["10.1.0.2/30"]);
    fs::remove_file(node.path("10.1.0.2")).unwrap();
    // Two plugins do not come and go within a tick.
    std::thread::sleep(std::time::Duration::from_millis(20));
    node.write("10.1.0.2", &text("a"));
    // Nobody looked before the system went down.
    node.boot = "second-boot";
    let full = node.add_if("b", &config, &dead).unwrap_err();
    assert!(full.contains("no IP addresses"), "{full}");
    assert_eq!(node.del("a"), [ip("10.1.0.2")]);
}

#[test]
fn garbage_collection() {
    let node = Node::new();
    let config = dual();
    for id in ["a", "b", "c"] {
        node.add(id, &config).unwrap();
    }
    node.write("10.1.0.77", &text("stock"));
    node.write("10.1.0.78", "legacy");
    let other = Node {
        dir: node.dir,
        boot: node.boot,
    };
    let elsewhere = Store::open_in_boot(other.dir.path(), "other", other.boot.into()).unwrap();
    let _kept = elsewhere.allocate(owner("x"), &config, &alive).unwrap();
    let node = other;

    let under_way = node.store().allocate(owner("d"), &config, &alive).unwrap();
    let wrong_interface = Owner {
        container_id: "a",
        ifname: "eth1",
    };
    let valid = [wrong_interface, owner("b"), owner("unheard-of")];
    let mut freed = node.store().collect_garbage(&valid).unwrap();
    freed.sort();
    assert_eq!(
        freed,
        [
            "10.1.0.2",
            "10.1.0.4",
            "10.1.0.77",
            "10.1.0.78",
            "fd00::2",
            "fd00::4"
        ]
        .map(ip)
    );
    assert_eq!(node.index(), ["b:eth0", "d:eth0"]);
    assert_eq!(elsewhere.check(owner("x")).unwrap().len(), 2);
    drop(under_way);
    assert_eq!(node.store().collect_garbage(&[]).unwrap().len(), 4);
    assert!(node.leases().is_empty());
}

#[test]
fn threads_get_different_addresses() {
    const THREADS: usize = 16;
    const EACH: usize = 15;
    let node = Node::new();
    let config =
        config(json!({"ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/120"}]]}));
    let barrier = Barrier::new(THREADS);
    let given: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (node, config, barrier) = (&node, &config, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    (0..EACH)
                        .flat_map(|n| node.add(&format!("t{thread}-{n}"), config).unwrap())
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(given.len(), 2 * THREADS * EACH);
    assert_eq!(given.iter().collect::<BTreeSet<_>>().len(), given.len());
    assert_eq!(node.leases().len(), given.len());
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let node = &node;
            scope.spawn(move || {
                for n in 0..EACH {
                    assert_eq!(node.del(&format!("t{thread}-{n}")).len(), 2);
                }
            });
        }
    });
    assert!(node.leases().is_empty() && node.index().is_empty());
}

// Whatever instruction a process dies at.

/// What a dead stock plugin left.
const EMPTY: &str = "10.1.0.200";

/// Every lease is whole, and whatever of its addresses an owner has, its DEL finds.
fn sound_after_crash(node: &Node, config: &Config) {
    for (address, content) in node.leases() {
        let whole = content == text("a") || content == text("b");
        assert!(whole || address == EMPTY, "{address}: {content:?}");
    }
    let held = node
        .leases()
        .values()
        .filter(|content| **content == text("a"))
        .count();
    assert_eq!(
        node.store().check(owner("a")).unwrap_or_default().len(),
        held
    );
    assert_eq!(node.del("a").len(), held);
    assert_eq!(
        node.store().check(owner("b")).unwrap().len(),
        2,
        "a bystander"
    );
    node.add("a", config).unwrap();
    node.del("a");
    assert_eq!(node.leases().len(), 2);
    assert_eq!(node.index(), ["b:eth0"]);
    node.store().collect_garbage(&[]).unwrap();
    let mut left: Vec<_> = fs::read_dir(node.net())
        .unwrap()
        .map(|it| it.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["last_reserved_ip.0", "last_reserved_ip.1", "lock"]);
}

/// Runs `operation` on fresh nodes, dying before its first change, its second, and so on.
fn at_every_instruction(prepare: impl Fn(&Node), operation: impl Fn(&Node) -> bool) {
    let config = dual();
    for changes in 0..100 {
        let node = Node::new();
        node.add("b", &config).unwrap();
        prepare(&node);
        crash_after(Some(changes));
        let done = operation(&node);
        crash_after(None);
        sound_after_crash(&node, &config);
        // Marking may fail and the operation still be done, so go a few further.
        if done && changes > 20 {
            return;
        }
    }
    panic!("the operation never ends");
}

#[test]
fn add_dies_anywhere() {
    let add = |node: &Node| node.store().allocate(owner("a"), &dual(), &alive).is_ok();
    at_every_instruction(|_| (), add);
}

#[test]
fn del_dies_anywhere() {
    let del = |node: &Node| node.store().release(owner("a")).is_ok();
    at_every_instruction(|node| drop(node.add("a", &dual()).unwrap()), del);
}

#[test]
fn import_dies_anywhere() {
    let prepare = |node: &Node| {
        node.add("a", &dual()).unwrap();
        node.write(EMPTY, "");
        node.write("10.1.0.201", &text("a"));
    };
    at_every_instruction(prepare, |node| node.store().check(owner("a")).is_ok());
}

#[test]
fn del_works_when_the_index_cannot_be_written() {
    let node = Node::new();
    node.add("a", &dual()).unwrap();
    node.add("b", &dual()).unwrap();
    node.write("10.1.0.200", &text("a"));
    // A directory in the way of an entry, as no file system is full on demand.
    let entry = node.dir.path().join(".bpf-bridge/net/b:eth0");
    fs::remove_file(&entry).unwrap();
    fs::create_dir(&entry).unwrap();
    assert!(node.store().check(owner("a")).is_err());
    assert_eq!(node.del("a").len(), 3);
    assert_eq!(
        node.leases().into_values().collect::<Vec<_>>(),
        [text("b"), text("b")]
    );
    fs::remove_dir(&entry).unwrap();
    assert_eq!(node.del("b").len(), 2);
}

#[test]
fn what_happens_within_a_tick_is_seen() {
    for node in [Node::new(), Node::on_disk()] {
        for n in 0..100 {
            // Leaves its mark, and at once somebody else is there.
            node.store().collect_garbage(&[]).unwrap();
            let (id, address) = (format!("c{n}"), format!("10.1.0.{}", n + 2));
            node.write(&address, &text(&id));
            assert_eq!(node.store().check(owner(&id)).unwrap(), [ip(&address)]);
            fs::remove_file(node.path(&address)).unwrap();
            assert!(node.store().check(owner(&id)).is_err());
        }
    }
}

#[test]
fn what_a_crash_leaves_is_of_use_to_nobody() {
    // An entry without leases.
    let node = Node::new();
    node.add("a", &dual()).unwrap();
    let entry = node.dir.path().join(".bpf-bridge/net/a:eth0");
    let target = fs::read_link(&entry).unwrap();
    node.del("a");
    symlink(&target, &entry).unwrap();
    assert_eq!(
        node.add_if(
            "b",
            &requesting(json!({"subnet": "10.1.0.0/24"}), "10.1.0.2"),
            &dead
        )
        .unwrap(),
        ["10.1.0.2/24"]
    );
    assert!(node.store().check(owner("a")).is_err());
    assert!(node.del("a").is_empty());
    assert_eq!(
        node.read("10.1.0.2"),
        text("b"),
        "not removed for the entry's sake"
    );
    // An index that somebody was at.
    fs::remove_file(node.dir.path().join(".bpf-bridge/net/b:eth0")).unwrap();
    symlink("nonsense", node.dir.path().join(".bpf-bridge/net/b:eth0")).unwrap();
    assert_eq!(node.store().check(owner("b")).unwrap(), [ip("10.1.0.2")]);
    // No index at all.
    fs::remove_dir_all(node.dir.path().join(".bpf-bridge")).unwrap();
    assert_eq!(node.del("b"), [ip("10.1.0.2")]);
}

#[test]
fn a_file_system_without_nameless_files() {
    let node = Node::new();
    fs::create_dir_all(node.net()).unwrap();
    node.write(".bpf-bridge.draft", "left behind");
    let directory = directory::Directory::open(node.net()).unwrap().unwrap();
    let draft = directory.named_draft(b"abc\r\neth0").unwrap();
    directory.publish(&draft, "10.1.0.2").unwrap();
    directory.publish(&draft, "fd00::2").unwrap();
    directory.publish(&draft, "fd00::2").unwrap_err();
    directory.settle(&draft).unwrap();
    assert_eq!(node.read("10.1.0.2"), text("abc"));
    assert_eq!(fs::metadata(node.path("fd00::2")).unwrap().nlink(), 2);
    assert!(!node.path(".bpf-bridge.draft").exists());
}

#[test]
fn the_cost_does_not_depend_on_the_number_of_leases() {
    let cost = |leases: u32| {
        let node = Node::new();
        for n in 0..leases {
            let address = std::net::Ipv4Addr::from(0x0a01_0002 + n);
            node.write(&address.to_string(), &text(&format!("c{n}")));
            node.write("last_reserved_ip.0", &address.to_string());
        }
        let config =
            config(json!({"ranges": [[{"subnet": "10.1.0.0/16"}], [{"subnet": "fd00::/64"}]]}));
        node.store().release(owner("nobody")).unwrap();
        let store = node.store();
        let start = steps();
        let lease = store.allocate(owner("new"), &config, &alive).unwrap();
        let add = steps();
        assert_eq!(store.check(owner("new")).unwrap().len(), 2);
        let check = steps();
        assert_eq!(store.release(owner("new")).unwrap().len(), 2);
        let del = steps();
        assert!(store.release(owner("new")).unwrap().is_empty());
        let second_del = steps();
        store.check_free(&config, &alive).unwrap();
        drop(lease);
        [
            add - start,
            check - add,
            del - check,
            second_del - del,
            steps() - second_del,
        ]
    };
    let few = cost(1);
    assert_eq!(cost(10_000), few);
    assert!(few.iter().all(|&steps| steps < 40), "{few:?}");
}

#[test]
fn a_long_stretch_in_use_is_skipped() {
    let node = Node::new();
    for n in 0..5_000_u32 {
        let address = std::net::Ipv4Addr::from(0x0a01_0002 + n);
        node.write(&address.to_string(), &text(&format!("c{n}")));
    }
    node.write("last_reserved_ip.0", "10.1.255.254");
    let store = node.store();
    store.release(owner("nobody")).unwrap();
    let start = steps();
    let lease = store
        .allocate(owner("new"), &subnet("10.1.0.0/16"), &alive)
        .unwrap();
    assert_eq!(lease.allocations[0].address.to_string(), "10.1.19.138/16");
    assert!(steps() - start < 120, "{}", steps() - start);
}

// Against a model.

#[derive(Clone, Debug)]
enum Op {
    Add(u8),
    Request(u8, u8),
    Del(u8),
    Gc(u8),
    Reboot,
    StockAdd(u8, u8),
    StockDel(u8),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        4 => (0..12_u8).prop_map(Op::Add),
        1 => (0..12_u8, 0..16_u8).prop_map(|(id, at)| Op::Request(id, at)),
        3 => (0..12_u8).prop_map(Op::Del),
        1 => any::<u8>().prop_map(Op::Gc),
        1 => Just(Op::Reboot),
        1 => (0..12_u8, 2..15_u8).prop_map(|(id, at)| Op::StockAdd(id, at)),
        1 => (0..12_u8).prop_map(Op::StockDel),
    ];
    prop::collection::vec(op, 1..60)
}

fn run(ops: &[Op]) -> Result<(), TestCaseError> {
    const BOOTS: [&str; 2] = ["odd", "even"];
    let mut node = Node {
        boot: BOOTS[0],
        ..Node::new()
    };
    let ipam = || json!({"subnet": "10.1.0.0/28"});
    let pool: BTreeSet<u8> = (2..15).collect();
    // Address to owner, and in which boot another program wrote it, if one did.
    let mut model: BTreeMap<u8, (u8, Option<&str>)> = BTreeMap::new();
    let mut boots = 0;
    let address = |at: u8| format!("10.1.0.{at}");
    let last = |given: &[String]| -> u8 {
        given[0]
            .trim_end_matches("/28")
            .rsplit('.')
            .next()
            .unwrap()
            .parse()
            .unwrap()
    };
    for op in ops {
        match *op {
            Op::Add(id) | Op::Request(id, _) => {
                let (conf, wanted) = match *op {
                    Op::Request(_, at) => (requesting(ipam(), &address(at)), Some(at)),
                    _ => (subnet("10.1.0.0/28"), None),
                };
                // What another program wrote in an earlier boot makes way for its owner,
                let boot = node.boot;
                let stale = |held: &(u8, Option<&str>)| held.1.is_some_and(|seen| seen != boot);
                let name = format!("c{id}");
                if model.values().any(|held| held.0 == id && stale(held)) {
                    model.retain(|_, held| held.0 != id);
                }
                let has = model.values().any(|held| held.0 == id);
                // and for others, if they have no other.
                if !has && wanted.is_none() && model.len() == pool.len() {
                    model.retain(|_, held| !stale(held));
                } else if !has && let Some(at) = wanted {
                    model.retain(|other, held| *other != at || !stale(held));
                }
                let free = match wanted {
                    Some(at) => pool.contains(&at) && !model.contains_key(&at),
                    None => model.len() < pool.len(),
                };
                match node.add(&name, &conf) {
                    Ok(given) => {
                        let at = last(&given);
                        prop_assert!(!has, "{id} has an address already");
                        prop_assert!(wanted.is_none_or(|wanted| wanted == at));
                        prop_assert!(
                            free && pool.contains(&at) && !model.contains_key(&at),
                            "{at}"
                        );
                        model.insert(at, (id, None));
                    }
                    Err(error) => prop_assert!(has || !free, "{error}"),
                }
            }
            Op::Del(id) => {
                let freed = node.del(&format!("c{id}")).len();
                prop_assert_eq!(freed, model.values().filter(|held| held.0 == id).count());
                model.retain(|_, held| held.0 != id);
            }
            Op::Gc(mask) => {
                let valid: Vec<_> = (0..12_u8).filter(|id| id % 8 != mask % 8).collect();
                let names: Vec<_> = valid.iter().map(|id| format!("c{id}")).collect();
                let owners: Vec<_> = names.iter().map(|name| owner(name)).collect();
                node.store().collect_garbage(&owners).unwrap();
                model.retain(|_, held| valid.contains(&held.0));
            }
            Op::Reboot => {
                // What is there is seen before the system goes down.
                node.del("nobody");
                boots += 1;
                node.boot = BOOTS[boots % 2];
                node.del("nobody");
                model.retain(|_, held| held.1.is_some());
            }
            Op::StockAdd(id, at) => {
                // As the stock plugin would: not twice for an owner, not over a file.
                if !model.contains_key(&at) && !model.values().any(|held| held.0 == id) {
                    node.write(&address(at), &text(&format!("c{id}")));
                    model.insert(at, (id, Some(node.boot)));
                }
            }
            Op::StockDel(id) => {
                for at in model.keys().filter(|at| model[at].0 == id) {
                    fs::remove_file(node.path(&address(*at))).unwrap();
                }
                model.retain(|_, held| held.0 != id);
            }
        }
        let expected: BTreeMap<_, _> = model
            .iter()
            .map(|(at, held)| (address(*at), text(&format!("c{}", held.0))))
            .collect();
        if node.net().exists() {
            prop_assert_eq!(node.leases(), expected);
        } else {
            prop_assert!(expected.is_empty());
        }
    }
    for (at, (id, _)) in &model {
        let held = node.store().check(owner(&format!("c{id}"))).unwrap();
        prop_assert!(held.contains(&ip(&address(*at))));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_order_of_operations_is_as_the_model(ops in ops()) {
        run(&ops)?;
    }
}

// With the stock plugin itself.

/// Whether the stock plugin is here; says so if not.
fn stock() -> bool {
    let here = Path::new(STOCK).exists();
    if !here {
        // Straight to the descriptor: the harness would swallow the reason.
        let _ = writeln!(
            std::io::stderr(),
            "skipped: {STOCK} is not installed (Debian: containernetworking-plugins)"
        );
    }
    here
}

fn run_stock(node: &Node, command: &str, id: &str) -> Result<Vec<String>, String> {
    let conf = json!({
        "cniVersion": "1.0.0", "name": NET,
        "ipam": {
            "type": "host-local", "dataDir": node.dir.path(),
            "ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]],
        },
    });
    let mut child = Command::new(STOCK)
        .env_clear()
        .envs(HashMap::from([
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", id),
            ("CNI_NETNS", "/none"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/none"),
        ]))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(conf.to_string().as_bytes())
        .unwrap();
    let mut out = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut out)
        .unwrap();
    if !child.wait().unwrap().success() {
        return Err(out);
    }
    let out: Value = serde_json::from_str(&out).unwrap_or_default();
    let ips = out["ips"].as_array().cloned().unwrap_or_default();
    Ok(ips
        .iter()
        .map(|ip| ip["address"].as_str().unwrap().to_owned())
        .collect())
}

#[test]
fn takes_turns_with_the_stock_plugin() {
    if !stock() {
        return;
    }
    let node = Node::new();
    let config = dual();
    assert_eq!(
        run_stock(&node, "ADD", "s1").unwrap(),
        ["10.1.0.2/24", "fd00::2/64"]
    );
    assert_eq!(
        node.add("o1", &config).unwrap(),
        ["10.1.0.3/24", "fd00::3/64"]
    );
    assert_eq!(
        run_stock(&node, "ADD", "s2").unwrap(),
        ["10.1.0.4/24", "fd00::4/64"]
    );
    assert_eq!(
        node.add("o2", &config).unwrap(),
        ["10.1.0.5/24", "fd00::5/64"]
    );

    // Each sees, refuses and removes what the other wrote.
    run_stock(&node, "CHECK", "o1").unwrap();
    assert!(
        run_stock(&node, "ADD", "o1")
            .unwrap_err()
            .contains("duplicate allocation")
    );
    assert_eq!(
        node.store().check(owner("s2")).unwrap(),
        [ip("10.1.0.4"), ip("fd00::4")]
    );
    assert!(
        node.add("s2", &config)
            .unwrap_err()
            .contains("duplicate allocation")
    );
    run_stock(&node, "DEL", "o1").unwrap();
    assert!(node.store().check(owner("o1")).is_err());
    assert_eq!(node.del("s1").len(), 2);
    run_stock(&node, "CHECK", "s1").unwrap_err();
    assert_eq!(
        node.leases().into_keys().collect::<Vec<_>>(),
        ["10.1.0.4", "10.1.0.5", "fd00::4", "fd00::5"]
    );
    assert_eq!(
        node.store().collect_garbage(&[owner("s2")]).unwrap().len(),
        2
    );
    run_stock(&node, "CHECK", "s2").unwrap();
    assert_eq!(node.index(), ["s2:eth0"]);
}

#[test]
fn works_beside_the_stock_plugin() {
    if !stock() {
        return;
    }
    let node = Node::new();
    let config = dual();
    let given: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|thread| {
                let (node, config) = (&node, &config);
                scope.spawn(move || {
                    let mut given = Vec::new();
                    for n in 0..6 {
                        let id = format!("t{thread}-{n}");
                        // The stock plugin leaves and takes its lock between its sets.
                        let addresses = match thread % 2 {
                            0 => node.add(&id, config).unwrap(),
                            _ => run_stock(node, "ADD", &id).unwrap(),
                        };
                        given.extend(addresses);
                    }
                    given
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(given.len(), 96);
    assert_eq!(given.iter().collect::<BTreeSet<_>>().len(), 96);
    for thread in 0..8 {
        for n in 0..6 {
            assert_eq!(node.del(&format!("t{thread}-{n}")).len(), 2);
        }
    }
    assert!(node.leases().is_empty() && node.index().is_empty());
}
