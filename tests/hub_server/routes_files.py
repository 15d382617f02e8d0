"""Routes about files: what a commit needs beforehand, LFS, commits, listings, downloads."""

from __future__ import annotations

import base64
import json

from .cards import check_card
from .errors import HubError, repo_not_found
from .store import Blob, Repo
from .wire import Answer, Call, route


LFS_OBJECT = "(?P<oid>[0-9a-f]{64})"


@route("POST", "/api/TYPE/REPO/preupload/(?P<revision>[^/]+)")
def preupload(call: Call) -> Answer:
    """How each file is to be sent, and the hash of the one that is there, by which clients skip what is unchanged."""
    repo = writable(call)
    current = repo.resolve(call.params["revision"]).files
    answers = []
    for path in (entry["path"] for entry in call.json["files"]):
        mode = call.hub.upload_mode(path)
        answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if path in current:
            blob = current[path]
            answer["oid"] = blob.sha256 if mode == "lfs" else blob.git_sha1
        answers.append(answer)
    return Answer({"files": answers})


@route("POST", r"/(?:(?P<type>datasets|spaces)/)?REPO\.git/info/lfs/objects/batch")
def lfs_batch(call: Call) -> Answer:
    """Where to put each object; no actions for one that is stored already."""
    repo, objects = call.repo(write=False), []
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    base = f"{call.hub.url}/lfs/{repo.type}s/{repo.id}"
    for wanted in call.json["objects"]:
        entry = {"oid": wanted["oid"], "size": wanted["size"]}
        if not stored(call, wanted["oid"], wanted["size"]):
            href = f"{base}/{wanted['oid']}"
            entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        objects.append(entry)
    return Answer({"transfer": "basic", "objects": objects})


@route("PUT", f"/lfs/TYPE/REPO/{LFS_OBJECT}")
def lfs_upload(call: Call) -> Answer:
    """Store an object; the address is the permission, as with the signed addresses of the real storage."""
    oid, store = call.params["oid"], call.hub.store
    if call.fault is not None and call.fault.kind == "truncate_upload":
        store.path(oid).write_bytes(call.body.read())
        return Answer({})
    blob = store.put(call.body, lfs=True)
    if blob.sha256 != oid:
        raise HubError(400, f"The content has the hash {blob.sha256}, not {oid}")
    return Answer({})


@route("POST", f"/lfs/TYPE/REPO/{LFS_OBJECT}/verify")
def lfs_verify(call: Call) -> Answer:
    fields = call.json
    if not stored(call, call.params["oid"], fields["size"]):
        raise HubError(422, f"LFS object {call.params['oid']} is not stored with {fields['size']} bytes")
    return Answer({})


@route("POST", "/api/TYPE/REPO/commit/(?P<revision>[^/]+)")
def commit(call: Call) -> Answer:
    """One commit from newline-separated JSON: a header, then files, LFS files and deletions."""
    repo, store, revision = writable(call), call.hub.store, call.params["revision"]
    header: dict[str, str] = {}
    added: dict[str, Blob] = {}
    deleted: list[str] = []
    for line in call.body:
        entry = json.loads(line)
        kind, value = entry["key"], entry["value"]
        if kind == "header":
            header = value
            continue
        path = checked_path(value["path"])
        if kind == "file":
            added[path] = store.put(base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            added[path] = lfs_blob(call, value["oid"], value.get("size"))
        elif kind in ("deletedFile", "deletedFolder"):
            deleted.append(path.rstrip("/") + ("/" if kind == "deletedFolder" else ""))
        else:
            raise HubError(400, f"Unknown entry {kind} in the commit")
    if "README.md" in added:
        errors, _ = check_card(store.path(added["README.md"].sha256).read_text("utf-8", "replace"))
        if errors:
            raise HubError(400, errors[0])
    if call.fault is not None and call.fault.kind == "stale_parent":
        store.commit(
            repo, revision, {"concurrent.txt": store.put(header["summary"].encode())}, title="Concurrent commit"
        )
    author = call.user.name if call.user else ""
    title, message = header.get("summary", ""), header.get("description", "")
    made, number = store.commit(
        repo, revision, added, deleted, title, message, author, header.get("parentCommit"), call.flag("create_pr")
    )
    url = f"{call.hub.url}/{repo.url_path}"
    body = {"success": True, "commitUrl": f"{url}/commit/{made.sha}", "commitOid": made.sha}
    return Answer(body if number is None else {**body, "pullRequestUrl": f"{url}/discussions/{number}"})


@route("GET", "/api/TYPE/REPO/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
def tree(call: Call) -> Answer:
    revision = call.repo().resolve(call.params["revision"])
    return call.paged(revision.tree(call.params.get("path", ""), call.flag("recursive")))


@route("POST", "/api/TYPE/REPO/paths-info/(?P<revision>[^/]+)")
def paths_info(call: Call) -> Answer:
    revision = call.repo().resolve(call.params["revision"])
    entries = [revision.entry(path.rstrip("/")) for path in call.form.get("paths", [])]
    return Answer([entry for entry in entries if entry is not None])


@route("GET", "/(?:(?P<type>datasets|spaces)/)?REPO/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(call: Call) -> Answer:
    """One file. X-Linked-* carry hash and size of an LFS file, as where the real Hub redirects to its storage."""
    revision = call.repo().resolve(call.params["revision"])
    blob = revision.file(call.params["path"])
    headers = {"X-Repo-Commit": revision.sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    if blob.lfs:
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
    return Answer(file=call.hub.store.path(blob.sha256), headers=headers)


def writable(call: Call) -> Repo:
    """The repository, if the user may commit to it; whoever may read it may open a pull request."""
    if not call.flag("create_pr"):
        return call.repo(write=True)
    if call.user is None:
        raise repo_not_found(call.params["repo"], signed_in=False)
    return call.repo()


def checked_path(path: str) -> str:
    if path.startswith("/") or any(part in ("", ".", "..", ".git") for part in path.rstrip("/").split("/")):
        raise HubError(400, f"Invalid path in the commit: {path}")
    return path


def stored(call: Call, oid: str, size: int) -> bool:
    blob = call.hub.store.lfs_blob(oid)
    return blob is not None and blob.size == size


def lfs_blob(call: Call, oid: str, size: int | None) -> Blob:
    blob = call.hub.store.lfs_blob(oid)
    if blob is None or (size is not None and blob.size != size):
        raise HubError(400, f"Your push was rejected: the LFS object {oid} was not uploaded")
    return blob
