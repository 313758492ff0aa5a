"use strict";
// Two videos in step: one clock (the dense video), the other follows to within half a frame.

class Player {
  /**
   * `onFrame(frame)` is called whenever another frame is shown.
   */
  constructor(numFrames, fps, onFrame) {
    this.numFrames = numFrames;
    this.fps = fps;
    this.onFrame = onFrame;
    this.frame = 0;
    this.playing = false;
    this.dense = byId("dense-video");
    this.draft = byId("draft-video");
    this.stage = byId("stage");
    this.canvas = byId("difference");
    this.views = ["side", "flip", "wipe", "difference"];
    this.urls = new Map();
    makeChoices(byId("views"), "view", ["Side by side", "Flip", "Wipe", "Difference"], 0, (i) => this.show(i));
    byId("scrub").max = numFrames - 1;
    byId("scrub").addEventListener("input", (event) => this.seek(Number(event.target.value)));
    byId("back").addEventListener("click", () => this.step(-1));
    byId("forward").addEventListener("click", () => this.step(1));
    byId("play").addEventListener("click", () => this.toggle());
    byId("swap").addEventListener("click", () => this.swap());
    byId("speed").addEventListener("change", (event) => this.setSpeed(Number(event.target.value)));
    byId("gain").addEventListener("change", () => this.setGain());
    this.setGain();
    this.stage.addEventListener("click", (event) => {
      if (event.target.closest(".divider")) return;
      if (this.stage.dataset.view === "flip") this.swap();
      else if (this.stage.dataset.view !== "wipe") this.toggle();
    });
    for (const video of [this.dense, this.draft]) {
      video.addEventListener("seeked", () => this.paint());
      video.addEventListener("loadeddata", () => this.seek(this.frame));
      video.addEventListener("error", () => this.complain(video));
    }
    this.listenToDivider();
    addEventListener("keydown", (event) => this.onKey(event));
    this.tick = this.tick.bind(this);
    this.report();
  }

  /** Shows a pair of videos at the frame that is showing now. `dense` and `draft` are paths in pageData.videos. */
  load(dense, draft, name) {
    this.say("");
    byId("draft-name").textContent = name;
    for (const [video, path] of [[this.dense, dense], [this.draft, draft]]) {
      const url = this.urlOf(path);
      if (video.dataset.path === path) continue;
      video.dataset.path = path;
      video.src = url;
    }
    this.setSpeed(Number(byId("speed").value));
    if (this.playing) this.play();
  }

  /** Where a video is: inside this page, or beside it. */
  urlOf(path) {
    if (!this.urls.has(path)) {
      const place = pageData.videos[path];
      if (place.id) {
        const bytes = bytesOf(byId(place.id).textContent);
        this.urls.set(path, URL.createObjectURL(new Blob([bytes], { type: "video/mp4" })));
      } else {
        this.urls.set(path, place.href);
      }
    }
    return this.urls.get(path);
  }

  complain(video) {
    this.pause();
    const path = video.dataset.path;
    this.say(pageData.videos[path].id
      ? "This browser cannot play H.264 video."
      : `The video ${path} is not inside this page and was not found beside it.`);
  }

  say(text) {
    byId("stage-message").textContent = text;
    byId("stage-message").hidden = !text;
  }

  seek(frame) {
    this.frame = clamp(frame, 0, this.numFrames - 1);
    // the middle of the frame: its edges belong to either neighbour
    const time = (this.frame + 0.5) / this.fps;
    for (const video of [this.dense, this.draft]) {
      if (video.readyState >= 1 && Math.abs(video.currentTime - time) > 1e-3) video.currentTime = time;
    }
    this.report();
  }

  step(by) {
    this.pause();
    this.seek((this.frame + by + this.numFrames) % this.numFrames);
  }

  toggle() {
    if (this.playing) this.pause();
    else this.play();
  }

  play() {
    this.playing = true;
    byId("play").textContent = "Pause";
    byId("play").setAttribute("aria-label", "Pause");
    if (this.frame === this.numFrames - 1) this.seek(0);
    this.start();
    requestAnimationFrame(this.tick);
  }

  start() {
    for (const video of [this.dense, this.draft]) video.play().catch(() => {});
  }

  pause() {
    if (!this.playing) return;
    this.playing = false;
    byId("play").textContent = "Play";
    byId("play").setAttribute("aria-label", "Play");
    for (const video of [this.dense, this.draft]) video.pause();
    this.seek(this.frame);
  }

  tick() {
    if (!this.playing) return;
    const { dense, draft } = this;
    if (dense.ended || draft.ended) {
      dense.currentTime = draft.currentTime = 0;
      this.start();
    } else if (!dense.seeking && !draft.seeking && Math.abs(draft.currentTime - dense.currentTime) > 0.5 / this.fps) {
      draft.currentTime = dense.currentTime;
    }
    const frame = clamp(Math.floor(dense.currentTime * this.fps + 1e-3), 0, this.numFrames - 1);
    if (frame !== this.frame) {
      this.frame = frame;
      this.report();
    }
    this.paint();
    requestAnimationFrame(this.tick);
  }

  report() {
    byId("scrub").value = this.frame;
    byId("scrub").setAttribute("aria-valuetext", `frame ${this.frame + 1} of ${this.numFrames}`);
    byId("frame-count").textContent = `frame ${this.frame + 1} / ${this.numFrames}`;
    this.onFrame(this.frame);
  }

  show(index) {
    const view = this.views[index];
    this.stage.dataset.view = view;
    byId("difference-pane").hidden = view !== "difference";
    byId("divider").hidden = view !== "wipe";
    document.querySelector(".gain").hidden = view !== "difference";
    byId("swap").textContent = view === "flip" ? "Flip" : "Swap";
    byId("swap").disabled = view === "difference";
    this.paint();
  }

  swap() {
    const swapped = this.stage.classList.toggle("swapped");
    byId("swap").setAttribute("aria-pressed", String(swapped));
  }

  setSpeed(speed) {
    this.dense.playbackRate = this.draft.playbackRate = speed;
  }

  setGain() {
    this.canvas.style.filter = `brightness(${byId("gain").value})`;
  }

  // Blending needs no pixel read back, so it also works for videos beside a page opened from disk.
  paint() {
    if (this.stage.dataset.view !== "difference" || this.dense.readyState < 2 || this.draft.readyState < 2) return;
    const { videoWidth: width, videoHeight: height } = this.dense;
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    const context = this.canvas.getContext("2d");
    context.globalCompositeOperation = "copy";
    context.drawImage(this.dense, 0, 0, width, height);
    context.globalCompositeOperation = "difference";
    context.drawImage(this.draft, 0, 0, width, height);
  }

  listenToDivider() {
    const divider = byId("divider");
    const move = (share) => {
      const percent = Math.round(clamp(share, 0, 100));
      this.stage.style.setProperty("--wipe", `${percent}%`);
      divider.setAttribute("aria-valuenow", percent);
    };
    const drag = (event) => {
      const box = this.stage.getBoundingClientRect();
      move(((event.clientX - box.left) / box.width) * 100);
    };
    this.stage.addEventListener("pointerdown", (event) => {
      if (this.stage.dataset.view !== "wipe") return;
      this.stage.setPointerCapture(event.pointerId);
      this.stage.addEventListener("pointermove", drag);
      drag(event);
    });
    for (const name of ["pointerup", "pointercancel"]) {
      this.stage.addEventListener(name, () => this.stage.removeEventListener("pointermove", drag));
    }
    divider.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -2, ArrowRight: 2, Home: -100, End: 100 }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      event.stopPropagation();
      move(Number(divider.getAttribute("aria-valuenow")) + by);
    });
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const control = event.target.closest?.("input, select, button, [role=slider], [role=radio], [tabindex]");
    const key = event.key.toLowerCase();
    if (key === "s" && !event.target.closest?.("select")) return this.swap();
    if ("1234".includes(key) && !event.target.closest?.("select")) {
      byId("views").querySelectorAll("input")[Number(key) - 1].click();
      return undefined;
    }
    if (control && control !== byId("scrub")) return undefined;
    if (key === " ") this.toggle();
    else if (key === "arrowleft") this.step(-1);
    else if (key === "arrowright") this.step(1);
    else return undefined;
    event.preventDefault();
    return undefined;
  }
}
