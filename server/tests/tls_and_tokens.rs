//! Servers over TCP: who gets in, who does not, what is said then, and that clients who mean harm harm nobody else.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use pegaflow_engine::{ErrorKind, LoadPolicy, Result};
use pegaflow_server::client::{Client, ClientConfig, Endpoint, Token};
use pegaflow_server::limits::{CONNECTIONS_PER_ADDRESS_MAX, HTTP_CONNECTIONS_MAX, SESSIONS_PER_CLIENT_MAX};
use pegaflow_server::{Access, ClientTls, NewToken, Role, ServerConfig, ServerTls, TcpService, TlsFiles, Tokens};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use support::{Local, PATIENCE, Process, Worker};

/// Files in a directory, all of them for their owner alone.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("ours");
        path
    }
}

/// An authority and what it signs.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("params");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).expect("signed").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Certificate and key for `localhost`, valid to the end of a year.
    fn sign(&self, last_year: i32) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).expect("params");
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(last_year, 12, 31);
        (params.signed_by(&key, &self.issuer).expect("signed").pem(), key.serialize_pem())
    }
}

const VALID: i32 = 2999;
const EXPIRED: i32 = 2021;

/// A server over TLS with a token for each role.
struct Served {
    local: Local,
    files: Files,
    authority: Authority,
    tokens: Vec<(Role, NewToken)>,
    tls: Arc<ServerTls>,
}

impl Served {
    fn new(last_year: i32, asks_for_certificates: bool) -> Self {
        let (files, authority) = (Files::new(), Authority::new());
        let (certificate, key) = authority.sign(last_year);
        let tokens: Vec<(Role, NewToken)> =
            Role::ALL.into_iter().map(|role| (role, NewToken::make(role, role.as_str()).expect("made"))).collect();
        let lines: Vec<&str> = tokens.iter().map(|(_, new)| new.line.as_str()).collect();
        files.write("ca.pem", &authority.pem);
        let tls_files = TlsFiles {
            certificate: files.write("cert.pem", &certificate),
            key: files.write("key.pem", &key),
            client_authorities: asks_for_certificates.then(|| files.write("clients.pem", &authority.pem)),
        };
        let tls = Arc::new(ServerTls::read(tls_files).expect("read"));
        let access = Access::tokens(Tokens::read(&files.write("tokens", &lines.join("\n"))).expect("read"));
        let address = "127.0.0.1:0".parse().expect("an address");
        let tcp = TcpService { address, tls: Some(Arc::clone(&tls)), access: Arc::new(access) };
        let local = Local::with_tcp(&ServerConfig::default(), Some(tcp));
        Self { local, files, authority, tokens, tls }
    }

    fn address(&self) -> SocketAddr {
        self.local.tcp.expect("listens")
    }

    fn config(&self, token: Option<&str>, authority: &str, identity: Option<(PathBuf, PathBuf)>) -> ClientConfig {
        let authorities = self.files.write("trusted.pem", authority);
        let tls = ClientTls { authorities, identity };
        let endpoint = Endpoint::Tls { host: "localhost".into(), port: self.address().port(), tls };
        let token = token.map(|token| Token::new(token).expect("a token"));
        ClientConfig { token, rpc_timeout: PATIENCE, lookup_timeout: PATIENCE, ..ClientConfig::new(endpoint, "test") }
    }

    fn token(&self, role: Role) -> &str {
        &self.tokens.iter().find(|(of, _)| *of == role).expect("one of each").1.token
    }

    fn connect(&self, token: Option<&str>) -> Result<Client> {
        connect(self.config(token, &self.authority.pem, None))
    }
}

/// A client that is connected, or why it is not.
fn connect(config: ClientConfig) -> Result<Client> {
    let client = Client::start(config)?;
    client.wait_connected(Duration::from_secs(3))?;
    Ok(client)
}

fn kind<T>(result: Result<T>) -> Result<(), ErrorKind> {
    result.map(drop).map_err(|error| error.kind())
}

#[test]
fn each_role_may_do_what_it_is_for_and_nothing_else() {
    let served = Served::new(VALID, false);
    const DENIED: Result<(), ErrorKind> = Err(ErrorKind::PermissionDenied);
    for (role, _) in &served.tokens {
        let worker = Worker::with(served.config(Some(served.token(*role)), &served.authority.pem, None));
        let client = &worker.client;
        client.wait_connected(PATIENCE).expect("every role gets in");
        assert_eq!(kind(client.stats()), Ok(()), "{role}");
        let allowed = |is_allowed: bool| if is_allowed { Ok(()) } else { DENIED };
        assert_eq!(kind(client.flush(PATIENCE)), allowed(*role != Role::ReadOnly), "{role}");
        assert_eq!(kind(client.explain("", 1)), allowed(*role == Role::Operator), "{role}");
        assert_eq!(kind(client.load_policy(Some(LoadPolicy::Auto))), allowed(*role == Role::Operator), "{role}");
        let lookup = kind(worker.lookup(1));
        assert_eq!(lookup == DENIED, *role != Role::Engine, "{role}: {lookup:?}");
    }
    // Over the Unix socket nobody is asked for a token.
    assert_eq!(kind(served.local.worker().lookup(1)), Ok(()));
}

#[test]
fn without_a_token_that_is_known_nobody_gets_in() {
    let served = Served::new(VALID, false);
    let engine = served.token(Role::Engine).to_owned();
    for token in [None, Some("pega_unknown"), Some(&engine[..engine.len() - 1]), Some(&format!("{engine}0"))] {
        assert!(served.connect(token).is_err(), "{token:?}");
    }
    assert_eq!(served.local.server().sessions(), 0);
    served.connect(Some(&engine)).expect("as before");
}

#[test]
fn who_cannot_be_trusted_is_not_spoken_to() {
    let served = Served::new(VALID, false);
    let token = served.token(Role::Engine).to_owned();
    // A server of another authority, to this client.
    let error = connect(served.config(Some(&token), &Authority::new().pem, None)).err().expect("refused");
    assert!(error.message().contains("trusted"), "{error}");
    // A plain client on the TLS port.
    let plain = ClientConfig {
        rpc_timeout: Duration::from_secs(2),
        ..ClientConfig::new(Endpoint::Tcp(served.address()), "plain")
    };
    assert!(connect(plain).is_err());
    let mut raw = TcpStream::connect(served.address()).expect("connects");
    raw.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").expect("sends");
    raw.set_read_timeout(Some(PATIENCE)).expect("set");
    let mut answer = Vec::new();
    let _reset = raw.read_to_end(&mut answer);
    assert!(answer.len() < 64 && !answer.windows(3).any(|bytes| bytes == b"h2c"), "{answer:?}");
    served.connect(Some(&token)).expect("as before");

    let expired = Served::new(EXPIRED, false);
    let error = expired.connect(Some(expired.token(Role::Engine))).err().expect("refused");
    assert!(error.message().contains("expired") || error.message().contains("Expired"), "{error}");
}

#[test]
fn where_certificates_are_asked_for_a_token_alone_is_not_enough() {
    let served = Served::new(VALID, true);
    let token = served.token(Role::Engine).to_owned();
    let identity = |authority: &Authority, last_year, name: &str| {
        let (certificate, key) = authority.sign(last_year);
        let write = |what: &str, text: &str| served.files.write(&format!("{name}-{what}"), text);
        Some((write("cert.pem", &certificate), write("key.pem", &key)))
    };
    let with = |identity| connect(served.config(Some(&token), &served.authority.pem, identity));
    assert!(with(None).is_err(), "no certificate");
    assert!(with(identity(&served.authority, EXPIRED, "expired")).is_err(), "an expired one");
    assert!(with(identity(&Authority::new(), VALID, "foreign")).is_err(), "one of another authority");
    with(identity(&served.authority, VALID, "good")).expect("certificate and token");
    let no_token = served.config(None, &served.authority.pem, identity(&served.authority, VALID, "good"));
    assert!(connect(no_token).is_err(), "a certificate alone");
}

#[test]
fn keys_that_others_can_read_are_refused() {
    let (files, authority) = (Files::new(), Authority::new());
    let (certificate, key) = authority.sign(VALID);
    let (certificate, key) = (files.write("cert.pem", &certificate), files.write("key.pem", &key));
    let read = |certificate: &Path, key: &Path| {
        let files = TlsFiles { certificate: certificate.into(), key: key.into(), client_authorities: None };
        kind(ServerTls::read(files))
    };
    assert_eq!(read(&certificate, &key), Ok(()));
    assert_eq!(read(&key, &key), Err(ErrorKind::InvalidInput), "a key is no certificate");
    assert_eq!(read(&certificate, &files.write("other.pem", &authority.sign(VALID).1)), Err(ErrorKind::InvalidInput));
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).expect("ours");
    assert_eq!(read(&certificate, &key), Err(ErrorKind::PermissionDenied));
}

#[test]
fn a_changed_certificate_is_taken_up_and_a_bad_one_is_not() {
    let served = Served::new(EXPIRED, false);
    let token = served.token(Role::Engine).to_owned();
    assert!(served.connect(Some(&token)).is_err());
    served.files.write("cert.pem", "no certificate");
    assert!(served.tls.reload().is_err());
    let (certificate, key) = served.authority.sign(VALID);
    served.files.write("cert.pem", &certificate);
    served.files.write("key.pem", &key);
    served.tls.reload().expect("read");
    served.connect(Some(&token)).expect("trusted");
}

#[test]
fn sessions_of_one_client_are_bounded_and_others_have_theirs() {
    let served = Served::new(VALID, false);
    let engine = served.token(Role::Engine).to_owned();
    let first = served.connect(Some(&engine)).expect("connects");
    // One address has fewer connections than a client has sessions: the gate says no first.
    let mut others = Vec::new();
    for _ in 0..CONNECTIONS_PER_ADDRESS_MAX.max(SESSIONS_PER_CLIENT_MAX) {
        let config = ClientConfig {
            rpc_timeout: Duration::from_secs(2),
            ..served.config(Some(&engine), &served.authority.pem, None)
        };
        others.push(Client::start(config).expect("starts"));
    }
    support::until("most are in", || {
        served.local.server().sessions() >= SESSIONS_PER_CLIENT_MAX.min(CONNECTIONS_PER_ADDRESS_MAX)
    });
    assert!(served.local.server().sessions() <= SESSIONS_PER_CLIENT_MAX);
    assert_eq!(kind(first.stats()), Ok(()));
    assert_eq!(kind(served.local.worker().lookup(1)), Ok(()));
    drop(others);
}

/// A server process over TLS with few descriptors, its log in a file, and the command line as its client.
struct Program {
    _server: Process,
    files: Files,
    socket: PathBuf,
    tcp: SocketAddr,
    http: SocketAddr,
}

impl Program {
    fn start() -> Self {
        let (files, authority) = (Files::new(), Authority::new());
        let (certificate, key) = authority.sign(VALID);
        let new = NewToken::make(Role::Operator, "alice").expect("made");
        let (certificate, key) = (files.write("cert.pem", &certificate), files.write("key.pem", &key));
        files.write("ca.pem", &authority.pem);
        files.write("alice", &new.token);
        let tokens = files.write("tokens", &new.line);
        let socket = files.0.path().join("p.sock");
        // As a shell would: the server raises the soft limit to the hard one, so both are set.
        let mut command = Command::new("/bin/sh");
        let log = files.0.path().join("server.log");
        command
            .args(["-c", "ulimit -n 1024; exec \"$@\" 2>\"$0\""])
            .arg(&log)
            .arg(env!("CARGO_BIN_EXE_pegaflow-server"))
            .args(["--dram", "32MiB", "--http", "127.0.0.1:0", "--tcp", "127.0.0.1:0", "--socket"])
            .arg(&socket)
            .arg("--tls-cert")
            .arg(&certificate)
            .arg("--tls-key")
            .arg(&key)
            .arg("--tokens")
            .arg(&tokens)
            .env_remove("PEGAFLOW_PATH")
            .stdout(std::process::Stdio::piped());
        let (server, ready) = Process::start(command);
        let address = |name: &str| ready[name].as_str().expect("listens").parse().expect("an address");
        Self { tcp: address("tcp"), http: address("http"), _server: server, files, socket }
    }

    /// Exit code and what was said of a command over TLS.
    fn ask(&self, command: &str) -> (Option<i32>, String) {
        let path = |name: &str| self.files.0.path().join(name);
        let output = Command::new(env!("CARGO_BIN_EXE_pegaflow"))
            .args(["--server", &format!("https://localhost:{}", self.tcp.port()), "--connect-timeout", "3", command])
            .arg("--ca")
            .arg(path("ca.pem"))
            .arg("--token-file")
            .arg(path("alice"))
            .output()
            .expect("runs");
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&said).into_owned())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.files.0.path().join("server.log")).expect("there")
    }

    fn hang_up(&self) {
        self._server.signal("-HUP");
    }
}

#[test]
fn the_command_line_over_tls_and_what_sighup_takes_up() {
    let program = Program::start();
    let (code, said) = program.ask("status");
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(program.ask("flush").0, Some(0));
    // Somebody else's line in place of alice's, and a certificate of another authority.
    let other = NewToken::make(Role::Operator, "bob").expect("made");
    program.files.write("tokens", &other.line);
    program.hang_up();
    support::until("alice is out", || program.ask("status").0 == Some(4));
    program.files.write("tokens", "nonsense");
    program.files.write("alice", &other.token);
    program.hang_up();
    support::until("the log says so", || program.log().contains("the tokens stay as they are"));
    assert_eq!(program.ask("status").0, Some(0), "bob is in");
    let authority = Authority::new();
    let (certificate, key) = authority.sign(VALID);
    program.files.write("cert.pem", &certificate);
    program.files.write("key.pem", &key);
    program.hang_up();
    support::until("the old authority is worth nothing", || program.ask("status").0 == Some(4));
    program.files.write("ca.pem", &authority.pem);
    assert_eq!(program.ask("status").0, Some(0));
}

#[test]
fn a_token_is_printed_once_and_its_file_says_nothing_of_it() {
    let new = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_pegaflow")).args(["token", "new"]).args(arguments).output().expect("runs")
    };
    let made = new(&["--role", "operator", "--name", "alice", "--json"]);
    let made: serde_json::Value = serde_json::from_slice(&made.stdout).expect("JSON");
    let (token, line) = (made["token"].as_str().expect("text"), made["line"].as_str().expect("text"));
    assert!(line.starts_with("operator alice ") && !line.contains(token), "{line}");
    assert_eq!(new(&["--role", "root", "--name", "alice"]).status.code(), Some(2));
    assert_eq!(new(&["--role", "engine", "--name", "a b"]).status.code(), Some(2));
}

#[test]
fn ten_thousand_half_open_clients_leave_the_server_unharmed() {
    let program = Program::start();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let before = program.ask("status");
    assert_eq!(before.0, Some(0), "{}", before.1);
    // They come from another address; whom the server closed frees its descriptor here.
    let open = runtime.block_on(async {
        let mut open = std::collections::VecDeque::new();
        for number in 0..10_000u32 {
            let target = if number % 2 == 0 { program.tcp } else { program.http };
            let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
            socket.bind("127.0.0.3:0".parse().expect("an address")).expect("bound");
            match tokio::time::timeout(PATIENCE, socket.connect(target)).await {
                Ok(Ok(stream)) => open.push_back(stream),
                Ok(Err(_)) => {}
                Err(_) => panic!("connection {number} is neither taken nor refused"),
            }
            if open.len() > 400 {
                open.pop_front();
            }
        }
        open
    });
    let (code, said) = program.ask("status");
    assert_eq!(code, Some(0), "over TLS, with all of them there: {said}");
    let worker = Worker::new(Endpoint::Unix(program.socket.clone()));
    worker.register();
    worker.client.wait_connected(PATIENCE).expect("over the Unix socket");
    assert_eq!(worker.lookup(1).expect("served").hit_blocks, 0);
    let log = program.log();
    assert!(log.contains("too many connections") && log.contains("too many HTTP connections"), "{log}");
    assert!(log.lines().count() < 200, "a flood does not fill the log: {} lines", log.lines().count());
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", program._server.child.id())).expect("ours").count();
    assert!(descriptors < CONNECTIONS_PER_ADDRESS_MAX + HTTP_CONNECTIONS_MAX + 100, "{descriptors} descriptors");
    drop(open);
    // The HTTP port has its places again.
    support::until("HTTP answers", || {
        let mut stream = TcpStream::connect(program.http).expect("connects");
        let _closed = stream.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        let mut answer = String::new();
        let _closed = stream.read_to_string(&mut answer);
        answer.starts_with("HTTP/1.1 200")
    });
}

#[test]
fn a_client_that_does_not_come_to_the_point_is_cut_off() {
    let program = Program::start();
    let plain = Local::with(&ServerConfig::default(), Some("127.0.0.1:0".parse().expect("an address")));
    // One that says nothing at all, where no handshake is asked for.
    let mut silent = TcpStream::connect(plain.tcp.expect("listens")).expect("connects");
    silent.set_read_timeout(Some(PATIENCE)).expect("set");
    // And a good handshake, byte by byte, now and then.
    let mut slow = TcpStream::connect(program.tcp).expect("connects");
    slow.set_read_timeout(Some(Duration::from_millis(300))).expect("set");
    let mut hello = [22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3].into_iter().chain(std::iter::repeat(0));
    support::until("the handshake is cut off", || {
        let _closed = slow.write_all(&[hello.next().expect("endless")]);
        match slow.read(&mut [0; 64]) {
            Ok(read) => read == 0,
            Err(error) => !matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut),
        }
    });
    assert_eq!(program.ask("status").0, Some(0), "others are served");
    assert!(program.log().contains("a TLS handshake failed"), "{}", program.log());
    // The server's first frame comes at once, then nothing, then the end.
    let ended = silent.read_to_end(&mut Vec::new());
    let is_late = |error: &std::io::Error| error.kind() == std::io::ErrorKind::WouldBlock;
    assert!(!ended.as_ref().is_err_and(is_late), "still open after {PATIENCE:?}: {ended:?}");
    assert_eq!(kind(plain.worker().lookup(1)), Ok(()));
}

/// The socket's mode keeps others out; this looks at what stands behind it.
#[test]
fn another_user_is_cut_off_even_where_the_socket_lets_him_in() {
    if !rustix::process::geteuid().is_root() {
        println!("only root can be another user");
        return;
    }
    let program = Program::start();
    let open = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("ours");
    open(program.files.0.path(), 0o755);
    open(&program.socket, 0o666);
    let (copy, nobody) = (program.files.0.path().join("pegaflow"), 65_534);
    std::fs::copy(env!("CARGO_BIN_EXE_pegaflow"), &copy).expect("copied");
    open(&copy, 0o755);
    let ask = |uid| {
        let mut command = Command::new(&copy);
        command.args(["--connect-timeout", "2", "status", "--socket"]).arg(&program.socket).uid(uid);
        command.output().expect("runs")
    };
    assert_eq!(ask(0).status.code(), Some(0));
    let refused = ask(nobody);
    assert_ne!(refused.status.code(), Some(0), "{}", String::from_utf8_lossy(&refused.stdout));
    assert!(program.log().contains("connection of another user refused"), "{}", program.log());
    assert_eq!(ask(0).status.code(), Some(0));
}
